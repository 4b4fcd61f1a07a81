"""A GAN at module level: two optimizers, two schedulers, three backwards an iteration."""
import torch
import torch.nn as nn
import torch.optim as optim

torch.manual_seed(9)
netG = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
netD = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
criterion = nn.BCELoss()
fixed_noise = torch.randn(6, 4)
optimizerD = optim.Adam(netD.parameters(), lr=1e-3, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=1e-3, betas=(0.5, 0.999))
schedulerD = optim.lr_scheduler.StepLR(optimizerD, 1, 0.9)
schedulerG = optim.lr_scheduler.StepLR(optimizerG, 1, 0.9)
dataset = torch.utils.data.TensorDataset(torch.randn(48, 2))
dataloader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
G_losses = []

for epoch in range(3):
    for i, data in enumerate(dataloader, 0):
        # (1) the discriminator
        netD.zero_grad()
        real = data[0]
        batch_size = real.size(0)
        label = torch.full((batch_size,), 1.0)
        output = netD(real).view(-1)
        errD_real = criterion(output, label)
        errD_real.backward()
        noise = torch.randn(batch_size, 4)
        fake = netG(noise)
        label.fill_(0.0)
        output = netD(fake.detach()).view(-1)
        errD_fake = criterion(output, label)
        errD_fake.backward()
        errD = errD_real + errD_fake
        optimizerD.step()

        # (2) the generator
        netG.zero_grad()
        label.fill_(1.0)
        output = netD(fake).view(-1)
        errG = criterion(output, label)
        errG.backward()
        optimizerG.step()
        G_losses.append(errG.item())

        if i % 4 == 0:
            print('[%d/%d] Loss_D: %.4f Loss_G: %.4f' % (epoch, i, errD.item(), errG.item()))
    schedulerD.step()
    schedulerG.step()
print("final", sum(p.double().sum().item() for p in netG.parameters()), len(G_losses))
