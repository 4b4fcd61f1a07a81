"""A test that adds up its losses and shows the mean only inside its own loop, on a progress bar.

Expected: `loss/val` is the last mean shown, `test_loss / (i + 1)`, and not the sum.
"""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

best = 0.0


def progress_bar(current, total, message):
    if current + 1 == total:
        print(message)


def train(epoch):
    net.train()
    train_loss = 0
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        optimizer.step()
        train_loss += loss.item()
        print("train", epoch * len(loader) + i + 1, loss.item())


def test(epoch):
    global best
    net.eval()
    test_loss = 0
    total = 0
    with torch.no_grad():
        for i, (x, y) in enumerate(held_out):
            loss = criterion(net(x), y)
            test_loss += loss.item()
            total += y.size(0)
            progress_bar(i, len(held_out), "val %d %r" % (
                (epoch + 1) * len(loader), test_loss / (i + 1)))
    if total > best:
        best = total


torch.manual_seed(42)
net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
loader = DataLoader(TensorDataset(torch.randn(24, 4), torch.randn(24, 1)), batch_size=6)
held_out = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 1)), batch_size=4)
criterion = nn.MSELoss()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for epoch in range(3):
    train(epoch)
    test(epoch)
print("final", sum(p.double().sum().item() for p in net.parameters()))
