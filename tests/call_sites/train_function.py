"""train() and test() called from main(), as in pytorch/examples mnist."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

def train(args, model, loader, optimizer, epoch):
    model.train()
    for i, (x, y) in enumerate(loader):
        if obs.skip_batch(): continue
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if i % args["log"] == 0: print(epoch, i, loss.item())
        obs.step(loss=loss, batch=x)
def test(model, loader):
    model.eval()
    total = 0.0
    with torch.no_grad():
        for x, y in loader: total += nn.functional.mse_loss(model(x), y).item()
    return total
def main():
    args = {"log": 2, "epochs": 3}
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    held_out = DataLoader(data, batch_size=10, shuffle=True)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    obs.init("run", config=args)
    obs.watch(model, optimizer=optimizer)
    obs.resume()
    for epoch in range(1, args["epochs"] + 1):
        if obs.skip_epoch(epoch): continue
        train(args, model, loader, optimizer, epoch)
        obs.validation(test(model, held_out))
        scheduler.step()
    obs.finish()
    final(model, scheduler.state_dict())
if __name__ == "__main__":
    main()
