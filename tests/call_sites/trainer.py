"""A Trainer that keeps all in itself; its scheduler is in sight."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

class Trainer:
    def __init__(self, model, loader):
        self.model, self.loader, self.global_step = model, loader, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, 15)
        self.history = []
    def training_step(self, batch):
        x, y = batch
        return (self.model(x) - y).square().mean()
    def fit(self, epochs):
        obs.watch(self.model, optimizer=self.optimizer)
        self.global_step = obs.resume(global_step=self.global_step)
        for epoch in range(epochs):
            if obs.skip_epoch(epoch): continue
            self.run_epoch()
    def run_epoch(self):
        for batch in self.loader:
            if obs.skip_batch(): continue
            self.loss = self.training_step(batch)
            self.optimizer.zero_grad()
            self.loss.backward()
            self.optimizer.step()
            self.lr_scheduler.step()
            self.global_step += 1
            self.history.append(self.loss.item())
            obs.step(self.global_step, loss=self.loss, carry={"global_step": self.global_step})
obs.init("run")
net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
trainer = Trainer(net, DataLoader(data, batch_size=4, shuffle=True))
trainer.fit(3)
obs.finish()
final(net, trainer.global_step)
