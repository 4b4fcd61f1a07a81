"""An endless iterator is drawn from in an inner loop of micro-batches, which holds the step."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def cycle(loader):
    while True:
        yield from loader


torch.manual_seed(42)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
optim = torch.optim.Adam(model.parameters(), lr=0.01)
x = torch.randn(40, 4)
batches = cycle(DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True))
for i in range(8):
    model.train()
    for _ in range(3):
        x, y = next(batches)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optim.step()
        optim.zero_grad()
    if i % 2 == 0:
        print("training loss", loss.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
