"""The step in a function within the function that has the loops."""
import math
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

def fit(epochs):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    step, best = 0, math.inf
    obs.watch(model, optimizer=optimizer)
    step, best = obs.resume(step=step, best=best)
    def one(x, y):
        nonlocal step, best
        loss = (model(x) - y).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        best = min(best, loss.item())
        obs.step(step, loss=loss, carry={"step": step, "best": best})
    for epoch in range(epochs):
        if obs.skip_epoch(epoch): continue
        for x, y in loader:
            if obs.skip_batch(): continue
            one(x, y)
    final(model, step, best)
obs.init("run")
fit(3)
obs.finish()
