"""A critic that steps several times in an inner loop, the generator once; `opt` are the options."""
import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--n_critic", type=int, default=2)
parser.add_argument("--n_steps", type=int, default=9)
opt = parser.parse_args()
torch.manual_seed(5)
generator = nn.Linear(3, 2)
discriminator = nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.1), nn.Linear(6, 1))
optimizer_G = torch.optim.RMSprop(generator.parameters(), lr=1e-3)
optimizer_D = torch.optim.RMSprop(discriminator.parameters(), lr=1e-3)

for step in range(opt.n_steps):
    for _ in range(opt.n_critic):
        real = torch.randn(8, 2)
        fake = generator(torch.randn(8, 3)).detach()
        loss_D = -torch.mean(discriminator(real)) + torch.mean(discriminator(fake))
        optimizer_D.zero_grad()
        loss_D.backward()
        optimizer_D.step()
    optimizer_G.zero_grad()
    loss_G = -torch.mean(discriminator(generator(torch.randn(8, 3))))
    loss_G.backward()
    optimizer_G.step()
    print("[%d] D %f G %f" % (step, loss_D.item(), loss_G.item()))
print("final", sum(p.double().sum().item() for p in generator.parameters()))
