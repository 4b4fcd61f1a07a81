"""What the table of edits starts from: epochs over a shuffled loader."""
import collections
import copy
import itertools
import math
import random

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset
from torch.utils.data import WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
loader = DataLoader(data, batch_size=4, shuffle=True)
obs.init("run")
obs.watch(model, optimizer=opt)
step = 0
step = obs.resume(step=step)
for epoch in range(1, 4):
    if obs.skip_epoch(epoch): continue
    for x, y in loader:
        if obs.skip_batch(): continue
        loss = (model(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        step += 1
        obs.step(step, loss=loss, batch=x)
obs.finish()
final(model)
