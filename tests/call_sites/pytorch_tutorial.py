"""After PyTorch's tutorial on training a classifier."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
trainloader = DataLoader(data, batch_size=4, shuffle=True)
obs.init("run")
obs.watch(net, optimizer=optimizer)
obs.resume()
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    running_loss = 0.0
    for i, batch in enumerate(trainloader, 0):
        if obs.skip_batch(): continue
        inputs, labels = batch
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(inputs), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if i % 2 == 1:
            print(f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss / 2:.3f}")
            running_loss = 0.0
        obs.step(loss=loss, batch=inputs)
print("Finished Training")
obs.finish()
final(net)
