"""The optimizer is made again, as another class, in mid-run."""
import torch
from torch import nn

torch.manual_seed(13)
model = nn.Linear(3, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for epoch in range(6):
    if epoch == 3:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(16, 3)
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(epoch, loss.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
