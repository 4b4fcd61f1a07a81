"""A policy and a reference that stays."""
import copy
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

policy = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
ref_model = copy.deepcopy(policy).eval()
for p in ref_model.parameters(): p.requires_grad_(False)
opt = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.02)
sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 15)
loader = DataLoader(data, batch_size=4, shuffle=True, pin_memory=False)
obs.init("run")
obs.watch(policy, optimizer=opt, scheduler=sched)
obs.resume()
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    for x, y in loader:
        if obs.skip_batch(): continue
        with torch.no_grad():
            reference = ref_model(x)
        chosen, rejected = (policy(x) - reference).unbind(1)
        loss = -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        sched.step()
        obs.step(loss=loss, batch=x)
obs.finish()
final(policy)
