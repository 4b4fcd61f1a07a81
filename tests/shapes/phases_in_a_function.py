"""Training and evaluation phases in one loop; the function that is called steps only if it trains.

Expected: the step is recorded where it is made, with its loss; the iterations of the other phase are
neither steps nor in loss/train.
"""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

seen = 0


def one_step(model, optimizer, x, y, train):
    global seen
    model.train(train)
    optimizer.zero_grad()
    with torch.set_grad_enabled(train):
        loss = nn.functional.mse_loss(model(x), y)
    if train:
        loss.backward()
        optimizer.step()
        seen += 1
        print("train", seen, loss.item())
    return loss.item()


def fit(model, loaders, optimizer, epochs):
    epoch = 0
    while epoch < epochs:
        for phase, loader in loaders.items():
            train = phase == "train"
            running_loss = 0.0
            for x, y in loader:
                running_loss += one_step(model, optimizer, x, y, train)
            averaged_loss = running_loss / len(loader)
            print("average", phase, averaged_loss)
        epoch += 1


torch.manual_seed(42)
net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
parts = {n: TensorDataset(torch.randn(k, 4), torch.randn(k, 1)) for n, k in (("train", 24), ("dev", 12))}
data = {n: DataLoader(part, batch_size=4, shuffle=n == "train") for n, part in parts.items()}
fit(net, data, torch.optim.Adam(net.parameters(), lr=0.01), 2)
print("final", sum(p.double().sum().item() for p in net.parameters()))
