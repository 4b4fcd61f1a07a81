"""Two models, two optimizers."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

netG, netD = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 1))
optG, optD = (torch.optim.Adam(n.parameters(), 0.02, (0.5, 0.99)) for n in (netG, netD))
fixed_noise = torch.randn(3, 2)
loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=0)
G_losses = []
obs.init("run")
obs.watch(netG, netD, optimizer=[optG, optD])
G_losses = obs.resume(G_losses=G_losses)
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    for i, (real, _) in enumerate(loader, 0):
        if obs.skip_batch(): continue
        netD.zero_grad()
        fake = netG(torch.randn(4, 2))
        errD = netD(fake.detach()).mean() - netD(real).mean()
        errD.backward()
        optD.step()
        netG.zero_grad()
        errG = -netD(fake).mean()
        errG.backward()
        optG.step()
        G_losses.append(errG.item())
        obs.step(loss=errG, batch=real, D=errD)
obs.finish()
final(netG, netD, G_losses)
