"""After the annotated transformer: batches from a generator function, two models."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

class TrainState:
    step: int = 0
    samples: int = 0
def rate(step): return (step + 1) ** -0.5 * min(1.0, (step + 1) / 4)
class SimpleLossCompute:
    def __init__(self, generator, criterion): self.generator, self.criterion = generator, criterion
    def __call__(self, x, y):
        sloss = self.criterion(self.generator(x), y)
        return sloss.data, sloss
def data_gen(n):
    for i in range(n):
        x = torch.randint(1, 11, (4, 5))
        yield x, x.clone()
def run_epoch(data_iter, model, loss_compute, optimizer, scheduler, accum_iter=1):
    total_tokens, total_loss, tokens, n_accum = 0, 0, 0, 0
    for i, (x, y) in enumerate(data_iter):
        if obs.skip_batch(): continue
        loss, loss_node = loss_compute(model(x), y)
        loss_node.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_accum += 1
        scheduler.step()
        total_loss += loss
        total_tokens += y.numel()
        tokens += y.numel()
        if i % 2 == 1:
            print("Epoch Step: %6d | Accumulation Step: %3d | Loss: %6.2f" % (i, n_accum, loss))
            tokens = 0
        del loss, loss_node
        obs.step(batch=x)
    return total_loss / max(1, total_tokens)
model = nn.Sequential(nn.Embedding(11, 8), nn.Dropout(0.1))
generator = nn.Linear(8, 11)
criterion = lambda x, y: nn.functional.cross_entropy(x.flatten(0, 1), y.flatten(), label_smoothing=0.1)
optimizer = torch.optim.Adam([*model.parameters(), *generator.parameters()], lr=0.5, betas=(0.9, 0.98))
lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer=optimizer, lr_lambda=rate)
obs.init("run")
obs.watch(model, generator, optimizer=optimizer, scheduler=lr_scheduler)
obs.resume()
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    model.train()
    run_epoch(data_gen(5), model, SimpleLossCompute(generator, criterion), optimizer, lr_scheduler)
    model.eval()
obs.finish()
final(model, generator, lr_scheduler.state_dict())
