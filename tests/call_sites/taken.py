"""A loop that takes its batches with next()."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))


def cycle(loader):
    while True:
        yield from loader


model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=4, shuffle=True)
obs.init("run")
obs.watch(model, optimizer=opt)
step = 0
step = obs.resume(step=step)
batches = iter(loader)
while step < 15:
    try:
        x, y = next(batches)
    except StopIteration:
        batches = iter(loader)
        x, y = next(batches)
    loss = (model(x) - y).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    step += 1
    obs.step(step, loss=loss, batch=x)
obs.finish()
final(model)
