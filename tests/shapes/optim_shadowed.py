"""The optimizer is called `optim` and shadows the module; only accuracy-like output."""
import torch
from torch import nn, optim

torch.manual_seed(4)
model = nn.Linear(5, 2)
optim = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
x, y = torch.randn(60, 5), torch.randint(2, (60,))
total_steps = 0
for epoch in range(3):
    perm = torch.randperm(60)
    for b in range(6):
        rows = perm[b * 10:(b + 1) * 10]
        xb, yb = x[rows], y[rows]
        loss = nn.functional.cross_entropy(model(xb), yb)
        optim.zero_grad()
        loss.backward()
        optim.step()
        total_steps += 1
    print(epoch, total_steps, loss.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
