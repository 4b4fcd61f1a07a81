"""After pytorch/examples vae: a sum of losses, the last loss read behind the loop."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 4), nn.Linear(2, 4)
    def forward(self, x):
        mu, logvar = self.enc(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        return self.dec(z), mu, logvar
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
train_loader, test_loader = DataLoader(data, 4, shuffle=True), DataLoader(data, 10)
def loss_function(recon, x, mu, logvar):
    return (recon - x).square().sum() - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
def train(epoch):
    model.train()
    train_loss = 0
    for batch_idx, (x, _) in enumerate(train_loader):
        if obs.skip_batch(): continue
        optimizer.zero_grad()
        loss = loss_function(model(x)[0], x, *model(x)[1:])
        loss.backward()
        train_loss += loss.item()
        optimizer.step()
        obs.step(loss=loss, batch=x)
    print("====> Epoch: {} Average loss: {:.4f}".format(epoch, train_loss / len(train_loader.dataset)))
    print(loss.item())
def test(epoch):
    model.eval()
    with torch.no_grad():
        print(sum(loss_function(model(x)[0], x, *model(x)[1:]).item() for x, _ in test_loader))
if __name__ == "__main__":
    obs.init("run")
    obs.watch(model, optimizer=optimizer)
    obs.resume()
    for epoch in range(1, 4):
        if obs.skip_epoch(epoch): continue
        train(epoch)
        test(epoch)
        with torch.no_grad(): sample = model.dec(torch.randn(2, 2))
    obs.finish()
    final(model)
