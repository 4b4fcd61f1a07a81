"""A loop by a count, and all that it carries in sight."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

def batch_of(split):
    at = torch.randint(len(data) - 4, (4,))
    return data[at]
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
obs.init("run")
obs.watch(model, optimizer=opt)
step, best, history = 0, 1e9, []
X, Y = batch_of("train")
step, best, history, X, Y = obs.resume(step=step, best=best, history=history, X=X, Y=Y)
while step < 15:
    for group in opt.param_groups:
        group["lr"] = 0.05 * (1 - step / 20)
    if step % 4 == 0:
        val = (model(X) - Y).square().mean().item()
        best = min(best, val)
        history.append(best)
    loss = (model(X) - Y).square().mean()
    X, Y = batch_of("train")
    opt.zero_grad()
    loss.backward()
    opt.step()
    step += 1
    obs.step(step, loss=loss)
obs.finish()
final(model, best, history)
