"""After kuangliu/pytorch-cifar: train(epoch) and test(epoch) over globals."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Linear(9, 3)
    def forward(self, x): return self.fc(torch.relu(self.bn(self.conv(x[:, None]))).flatten(1))
labels = torch.randint(3, (20,))
trainset = [(data[i][0], labels[i]) for i in range(20)]
trainloader = DataLoader(trainset, batch_size=4, shuffle=True, num_workers=0)
testloader = DataLoader(trainset, batch_size=10, shuffle=False)
best_acc, start_epoch = 0, 0
net = Net()
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
def train(epoch):
    print("Epoch: %d" % epoch)
    net.train()
    train_loss, correct, total = 0, 0, 0
    for batch_idx, (inputs, targets) in enumerate(trainloader):
        if obs.skip_batch(): continue
        optimizer.zero_grad()
        outputs = net(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        train_loss += loss.item()
        _, predicted = outputs.max(1)
        total += targets.size(0)
        correct += predicted.eq(targets).sum().item()
        print(batch_idx, "Loss: %.3f" % (train_loss / (batch_idx + 1)), 100.0 * correct / total)
        obs.step(loss=loss, batch=inputs)
def test(epoch):
    global best_acc
    net.eval()
    correct = 0
    with torch.no_grad():
        for inputs, targets in testloader:
            correct += net(inputs).max(1)[1].eq(targets).sum().item()
    acc = 100.0 * correct / 20
    if acc > best_acc:
        torch.save({"net": net.state_dict(), "acc": acc, "epoch": epoch}, "ckpt.pth")
        best_acc = acc
obs.init("run")
obs.watch(net, optimizer=optimizer, scheduler=scheduler)
best_acc = obs.resume(best_acc=best_acc)
for epoch in range(start_epoch, start_epoch + 3):
    if obs.skip_epoch(epoch): continue
    train(epoch)
    test(epoch)
    scheduler.step()
obs.finish()
final(net, best_acc)
