"""The function that steps is wrapped before the loop, as torch.compile would."""
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def update(model, optimizer, x, y):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step = partial(update, model, optimizer)
    step = 0
    for epoch in range(2):
        for x, y in loader:
            loss = train_step(x, y)
            step += 1
            print("train", step, loss.item())
    print("final", sum(p.double().sum().item() for p in model.parameters()))


main()
