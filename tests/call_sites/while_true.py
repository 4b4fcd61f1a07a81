"""A loop that breaks, with micro-batches."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
obs.init("run")
obs.watch(model, optimizer=opt)
iter_num = 0
iter_num = obs.resume(iter_num=iter_num)
while True:
    if obs.ended(): break
    x, y = data[torch.randint(20, (4,))]
    for micro in range(2):
        loss = (model(x) - y).square().mean() / 2
        loss.backward()
    opt.step()
    opt.zero_grad(set_to_none=True)
    iter_num += 1
    obs.step(iter_num, loss=loss, last=iter_num >= 15)
    if iter_num >= 15:
        break
obs.finish()
final(model)
