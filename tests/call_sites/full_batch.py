"""One step an epoch, nothing but skip_epoch()."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

x, y = data[:]
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
opt = torch.optim.Adam(model.parameters(), lr=0.02)
obs.init("run")
obs.watch(model, optimizer=opt)
obs.resume()
for epoch in range(15):
    if obs.skip_epoch(epoch): continue
    model.train()
    opt.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    opt.step()
    obs.step(epoch, loss=loss, samples=20)
obs.finish()
final(model)
