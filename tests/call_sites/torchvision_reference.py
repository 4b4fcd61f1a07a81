"""After torchvision's references: batches through a logger's generator."""
import collections
import math
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

import datetime, time
class SmoothedValue:
    def __init__(self): self.deque, self.total, self.count = collections.deque(maxlen=20), 0.0, 0
    def update(self, value):
        self.deque.append(value)
        self.count += 1
        self.total += value
class MetricLogger:
    def __init__(self): self.meters = collections.defaultdict(SmoothedValue)
    def update(self, **kwargs):
        for k, v in kwargs.items(): self.meters[k].update(v.item() if isinstance(v, torch.Tensor) else v)
    def log_every(self, iterable, print_freq, header=""):
        i, start, end = 0, time.time(), time.time()
        for obj in iterable:
            yield obj
            if i % print_freq == 0: print(header, i, {k: m.total / m.count for k, m in self.meters.items()})
            i += 1
            end = time.time()
        print(str(datetime.timedelta(seconds=int(time.time() - start))))
def adjust_learning_rate(optimizer, epoch):
    for group in optimizer.param_groups: group["lr"] = 0.05 * (1 + math.cos(epoch))
    return group["lr"]
def train_one_epoch(model, optimizer, data_loader, epoch):
    model.train()
    metric_logger = MetricLogger()
    for step, (x, y) in enumerate(metric_logger.log_every(data_loader, 2, f"Epoch: [{epoch}]")):
        if obs.skip_batch(): continue
        lr = adjust_learning_rate(optimizer, step / len(data_loader) + epoch)
        losses = {"box": (model(x) - y).abs().mean(), "reg": 0.1 * model(x).square().mean()}
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metric_logger.update(loss=loss, lr=lr, **losses)
        obs.step(loss=loss, batch=x)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
params = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9)
data_loader = DataLoader(data, batch_size=4, sampler=torch.utils.data.RandomSampler(data))
start_time = time.time()
obs.init("run")
obs.watch(model, optimizer=optimizer)
obs.resume()
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    train_one_epoch(model, optimizer, data_loader, epoch)
print(str(datetime.timedelta(seconds=int(time.time() - start_time))))
obs.finish()
final(model)
