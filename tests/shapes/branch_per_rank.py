"""An epoch's function, named like an evaluation and called in both branches of an `if`."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def run(rank, epochs):
    torch.manual_seed(42)
    net_g, net_d = nn.Linear(4, 4), nn.Linear(4, 1)
    optim_g = torch.optim.AdamW(net_g.parameters(), lr=1e-2)
    optim_d = torch.optim.AdamW(net_d.parameters(), lr=1e-2)
    sched_g = torch.optim.lr_scheduler.ExponentialLR(optim_g, gamma=0.9)
    loader = DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4, shuffle=True)
    for epoch in range(1, epochs + 1):
        if rank == 0:
            train_and_evaluate(rank, epoch, [net_g, net_d], [optim_g, optim_d], [loader, loader])
        else:
            train_and_evaluate(rank, epoch, [net_g, net_d], [optim_g, optim_d], [loader, None])
        sched_g.step()
    print("final", sum(p.double().sum().item() for p in net_g.parameters()))


def train_and_evaluate(rank, epoch, nets, optims, loaders):
    net_g, net_d = nets
    optim_g, optim_d = optims
    for step, (x,) in enumerate(loaders[0]):
        fake = net_g(x)
        loss_disc = net_d(x).relu().mean() + (1 - net_d(fake.detach())).relu().mean()
        optim_d.zero_grad()
        loss_disc.backward()
        optim_d.step()
        loss_gen = (1 - net_d(net_g(x))).square().mean()
        optim_g.zero_grad()
        loss_gen.backward()
        optim_g.step()
        print("seen", epoch, step, loss_gen.item())
    if rank == 0:
        evaluate(net_g, loaders[1])


def evaluate(net, loader):
    with torch.no_grad():
        print("picture", sum(net(x).mean().item() for (x,) in loader))


if __name__ == "__main__":
    run(0, 2)
