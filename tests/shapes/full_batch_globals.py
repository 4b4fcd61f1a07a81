"""A helper per epoch that works on globals: full batch, no loader at all."""
import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

parser = argparse.ArgumentParser()
parser.add_argument('--epochs', type=int, default=10)
args = parser.parse_args()
torch.manual_seed(2)
features = torch.randn(30, 6)
labels = torch.randint(3, (30,))
idx_train, idx_val, idx_test = torch.arange(15), torch.arange(15, 22), torch.arange(22, 30)
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
optimizer = Adam(model.parameters(), lr=0.01, weight_decay=5e-4)


def train(epoch):
    model.train()
    optimizer.zero_grad()
    output = model(features)
    loss_train = F.cross_entropy(output[idx_train], labels[idx_train])
    loss_train.backward()
    optimizer.step()
    model.eval()
    output = model(features)
    loss_val = F.cross_entropy(output[idx_val], labels[idx_val])
    print('Epoch: {:04d} loss_train: {:.4f} loss_val: {:.4f}'.format(
        epoch + 1, loss_train.item(), loss_val.item()))


def test():
    model.eval()
    output = model(features)
    loss_test = F.cross_entropy(output[idx_test], labels[idx_test])
    print("Test set results:", "loss= {:.4f}".format(loss_test.item()))


for epoch in range(args.epochs):
    train(epoch)
test()
print("final", sum(p.double().sum().item() for p in model.parameters()))
