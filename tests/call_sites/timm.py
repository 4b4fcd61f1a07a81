"""After timm: an average in a Module, mixup by numpy, a schedule by the number of updates."""
import copy
import math
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

from collections import OrderedDict
class ModelEma(nn.Module):
    def __init__(self, model, decay=0.9):
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay = decay
    @torch.no_grad()
    def update(self, model):
        for e, m in zip(self.module.state_dict().values(), model.state_dict().values()):
            e.copy_(self.decay * e + (1 - self.decay) * m)
class Mixup:
    def __init__(self, alpha): self.mixup_alpha, self.mixup_enabled = alpha, True
    def __call__(self, x, target):
        lam = float(np.random.beta(self.mixup_alpha, self.mixup_alpha))
        return x * lam + x.flip(0) * (1 - lam), target
class CosineScheduler:
    def __init__(self, optimizer): self.optimizer = optimizer
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def step_update(self, num_updates):
        for g in self.optimizer.param_groups: g["lr"] = 0.05 * math.cos(num_updates / 15)
def train_one_epoch(epoch, model, loader, optimizer, mixup_fn, lr_scheduler, model_ema):
    model.train()
    num_updates = epoch * len(loader)
    last_idx = len(loader) - 1
    for batch_idx, (input, target) in enumerate(loader):
        if obs.skip_batch(): continue
        last_batch = batch_idx == last_idx
        input, target = mixup_fn(input, target)
        loss = nn.functional.mse_loss(model(input), target)
        optimizer.zero_grad()
        loss.backward(create_graph=False)
        optimizer.step()
        model_ema.update(model)
        num_updates += 1
        lr_scheduler.step_update(num_updates=epoch * len(loader) + batch_idx + 1)
        if last_batch or batch_idx % 2 == 0: print(loss.item())
        obs.step(loss=loss, batch=input)
    return OrderedDict([("loss", loss.item())])
def main():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model_ema, mixup_fn = ModelEma(model), Mixup(0.8)
    lr_scheduler = CosineScheduler(optimizer)
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    best_metric, best_epoch = None, None
    obs.init("run")
    obs.watch(model, model_ema, optimizer=optimizer)
    best_metric, best_epoch = obs.resume(best_metric=best_metric, best_epoch=best_epoch)
    for epoch in range(3):
        if obs.skip_epoch(epoch): continue
        metrics = train_one_epoch(epoch, model, loader, optimizer, mixup_fn, lr_scheduler, model_ema)
        if best_metric is None or metrics["loss"] < best_metric:
            best_metric, best_epoch = metrics["loss"], epoch
    obs.finish()
    final(model, model_ema, best_metric, best_epoch)
main()
