"""After pytorch/examples imagenet: meters, a best accuracy, workers."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

import time
class AverageMeter(object):
    def __init__(self, name):
        self.name = name
        self.reset()
    def reset(self): self.val = self.avg = self.sum = self.count = 0
    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count
class ProgressMeter(object):
    def __init__(self, meters): self.meters = meters
    def display(self, batch): print(batch, *(f"{m.name} {m.avg:.4f}" for m in self.meters))
def train(train_loader, model, criterion, optimizer, epoch, args):
    batch_time, losses = AverageMeter("Time"), AverageMeter("Loss")
    progress = ProgressMeter([batch_time, losses])
    model.train()
    end = time.time()
    for i, (images, target) in enumerate(train_loader):
        if obs.skip_batch(): continue
        output = model(images)
        loss = criterion(output, target)
        losses.update(loss.item(), images.size(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        batch_time.update(time.time() - end)
        end = time.time()
        if i % args.print_freq == 0: progress.display(i + 1)
        obs.step(loss=loss, batch=images)
def validate(val_loader, model, criterion):
    model.eval()
    losses = AverageMeter("Loss")
    with torch.no_grad():
        for images, target in val_loader: losses.update(criterion(model(images), target).item())
    return losses.avg
def main_worker(args):
    best_acc1 = -1e9
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    criterion = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    train_sampler = None
    train_loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=1, sampler=train_sampler)
    val_loader = DataLoader(data, batch_size=10)
    obs.init("run", config=vars(args))
    obs.watch(model, optimizer=optimizer, scheduler=scheduler)
    best_acc1 = obs.resume(best_acc1=best_acc1)
    for epoch in range(args.start_epoch, args.epochs):
        if obs.skip_epoch(epoch): continue
        train(train_loader, model, criterion, optimizer, epoch, args)
        acc1 = -validate(val_loader, model, criterion)
        scheduler.step()
        is_best = acc1 > best_acc1
        best_acc1 = max(acc1, best_acc1)
        if is_best: torch.save(model.state_dict(), "best.pth")
    obs.finish()
    final(model, best_acc1)
import argparse
main_worker(argparse.Namespace(start_epoch=0, epochs=3, print_freq=2))
