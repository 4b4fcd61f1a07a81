"""After pytorch/examples word_language_model: a hidden state, a rate that is quartered."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

corpus = torch.randint(11, (2, 60))
class RNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(11, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 11)
    def forward(self, x, h):
        y, h = self.rnn(self.embed(x), h)
        return self.out(y), h
model = RNN()
def repackage(h): return h.detach()
def train():
    model.train()
    total_loss = 0.0
    hidden = torch.zeros(1, 2, 6)
    total_loss, hidden = obs.resume(total_loss=total_loss, hidden=hidden)
    for batch, i in enumerate(range(0, 50, 10)):
        if obs.skip_batch(): continue
        x, y = corpus[:, i : i + 9], corpus[:, i + 1 : i + 10]
        opt.zero_grad()
        hidden = repackage(hidden)
        output, hidden = model(x, hidden)
        loss = nn.functional.cross_entropy(output.flatten(0, 1), y.flatten())
        loss.backward()
        opt.step()
        total_loss += loss.item()
        if batch % 2 == 0 and batch > 0:
            print(total_loss / 2)
            total_loss = 0
        obs.step(loss=loss, batch=x)
def evaluate():
    model.eval()
    with torch.no_grad(): return model(corpus[:, :20], torch.zeros(1, 2, 6))[0].logsumexp(-1).mean().item()
opt = torch.optim.SGD(model.parameters(), lr=0.5)
lr, best_val_loss = 0.5, None
obs.init("run")
obs.watch(model, optimizer=opt)
lr, best_val_loss = obs.resume(lr=lr, best_val_loss=best_val_loss)
for epoch in range(1, 4):
    if obs.skip_epoch(epoch): continue
    train()
    val_loss = evaluate()
    obs.validation(val_loss)
    if not best_val_loss or val_loss < best_val_loss:
        best_val_loss = val_loss
    else:
        lr /= 4.0
        for g in opt.param_groups: g["lr"] = lr
obs.finish()
final(model, lr, best_val_loss)
