"""A match statement that decides whether an iteration learns."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = 0
    for epoch in range(2):
        for i, (x, y) in enumerate(loader):
            match i % 3:
                case 1:
                    continue
                case 2:
                    with torch.no_grad():
                        print("seen", model(x).sum().item())
                case _:
                    loss = nn.functional.mse_loss(model(x), y)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    step += 1
                    print("train", step, loss.item())
    print("final", sum(p.double().sum().item() for p in model.parameters()))


main()
