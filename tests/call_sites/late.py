"""What trains is made by the function that trains, after resume()."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))


def train(model):
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    g = torch.Generator().manual_seed(4)
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=g)
    for epoch in range(3):
        if obs.skip_epoch(epoch): continue
        for x, y in loader:
            if obs.skip_batch(): continue
            loss = (model(x) - y).square().mean()
            opt.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            obs.step(loss=loss, batch=x)


model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
obs.init("run")
obs.watch(model)
obs.resume()
train(model)
obs.finish()
final(model)
