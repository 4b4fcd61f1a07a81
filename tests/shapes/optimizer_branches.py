"""The optimizer comes out of an if/elif chain, the scheduler too."""
import argparse

import torch
import torch.optim as optim
from torch import nn
from torch.optim import lr_scheduler as schedules

parser = argparse.ArgumentParser()
parser.add_argument("--optim", default="adam")
parser.add_argument("--epochs", default=2, type=int)
cfg = parser.parse_args()
torch.manual_seed(12)
model = nn.Linear(4, 1)
if cfg.optim == "sgd":
    optimizer = optim.SGD(model.parameters(), lr=0.1)
elif cfg.optim == "adam":
    optimizer = optim.Adam(model.parameters(), lr=0.01)
elif cfg.optim == "rmsprop":
    optimizer = optim.RMSprop(model.parameters(), lr=0.01)
else:
    raise ValueError(cfg.optim)
if cfg.epochs > 5:
    sched = schedules.StepLR(optimizer, 1)
else:
    sched = schedules.ExponentialLR(optimizer, 0.5)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(torch.randn(30, 4), torch.randn(30, 1)), batch_size=5, shuffle=True)
for epoch in range(cfg.epochs):
    for inputs, targets in loader:
        pred = model(inputs)
        mse = nn.functional.mse_loss(pred, targets)
        l1 = sum(p.abs().sum() for p in model.parameters())
        loss = mse + 1e-3 * l1
        model.zero_grad()
        loss.backward(); optimizer.step()
    sched.step()
    print(epoch, mse.item(), l1.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
