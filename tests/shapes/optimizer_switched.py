"""A train() per epoch; another optimizer takes the place of the first in mid-run."""
import torch
from torch import nn

torch.manual_seed(42)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
x, y = torch.randn(32, 4), torch.randn(32, 1)
seen = 0


def evaluate(rows):
    model.eval()
    with torch.no_grad():
        return nn.functional.mse_loss(model(x[rows]), y[rows]).item()


def train():
    global seen
    model.train()
    i = 0
    while i < 24:
        data, targets = x[i:i + 6], y[i:i + 6]
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(data), targets)
        loss.backward()
        optimizer.step()
        seen += 1
        print("train", seen, loss.item())
        i += 6


best = []
try:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(1, 5):
        train()
        val_loss = evaluate(slice(24, 28))
        print("val", seen, val_loss)
        if len(best) > 1 and val_loss > min(best):
            optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=0, lambd=0.0)
        best.append(val_loss)
except KeyboardInterrupt:
    print("stopped")
test_loss = evaluate(slice(28, 32))
print("test", test_loss)
print("final", sum(p.double().sum().item() for p in model.parameters()))
