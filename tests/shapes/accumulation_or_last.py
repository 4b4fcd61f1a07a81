"""Accumulation that steps at the last batch, too, the loss divided in the backward."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accum, step = 3, 0
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for epoch in range(2):
        for i, (x, y) in enumerate(loader):
            loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss / accum).backward()
            if (i + 1) % accum == 0 or i + 1 == len(loader):
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                step += 1
                print("train", step, loss.item())
    print("final", sum(p.double().sum().item() for p in model.parameters()))


main()
