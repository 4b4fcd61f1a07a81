"""`loss_fn(model(x), y).backward()`: the loss has no name."""
import torch
from torch import nn

torch.manual_seed(8)
model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1))
loss_fn = nn.MSELoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for step in range(10):
    x = torch.randn(6, 3)
    y = x.sum(1, keepdim=True)
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()
print("final", sum(p.double().sum().item() for p in model.parameters()))
