"""Accumulation in a trainer: what is shown is the sum of the divided micro-losses.

Expected: `loss=total_loss`, which is what the script says; `loss * gradient_accumulate_every` is
the last micro-batch alone.
"""
import torch
from torch import nn


class Trainer:
    def __init__(self, model, batches, train_num_steps=6, gradient_accumulate_every=2):
        self.model = model
        self.dl = batches
        self.opt = torch.optim.Adam(model.parameters(), lr=0.01)
        self.step = 0
        self.train_num_steps = train_num_steps
        self.gradient_accumulate_every = gradient_accumulate_every

    def train(self):
        while self.step < self.train_num_steps:
            self.model.train()
            total_loss = 0.0
            for _ in range(self.gradient_accumulate_every):
                x, y = next(self.dl)
                loss = nn.functional.mse_loss(self.model(x), y)
                loss = loss / self.gradient_accumulate_every
                total_loss += loss.item()
                loss.backward()
            self.opt.step()
            self.opt.zero_grad()
            self.step += 1
            print("train", self.step, total_loss)


def cycle(pairs):
    while True:
        yield from pairs


torch.manual_seed(42)
pairs = [(torch.randn(3, 4), torch.randn(3, 1)) for _ in range(5)]
net = nn.Linear(4, 1)
Trainer(net, cycle(pairs)).train()
print("final", sum(p.double().sum().item() for p in net.parameters()))
