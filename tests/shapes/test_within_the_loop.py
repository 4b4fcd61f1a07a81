"""Every few batches a test batch is tried in the same loop, and `loss` and `pred` are named anew.

Expected: the training loss is recorded for each step (taken before the name is used again), and
the test loss as the validation of that step.
"""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(42)
dataloader = DataLoader(TensorDataset(torch.randn(24, 4), torch.randn(24, 1)), batch_size=6)
testdataloader = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)
classifier = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
done = 0
for epoch in range(3):
    for i, data in enumerate(dataloader, 0):
        points, target = data
        optimizer.zero_grad()
        classifier = classifier.train()
        pred = classifier(points)
        loss = nn.functional.mse_loss(pred, target)
        loss.backward()
        optimizer.step()
        done += 1
        print("train", done, loss.item())
        if i % 2 == 0:
            j, data = next(enumerate(testdataloader, 0))
            points, target = data
            classifier = classifier.eval()
            pred = classifier(points)
            loss = nn.functional.mse_loss(pred, target)
            print("val", done, loss.item())
print("final", sum(p.double().sum().item() for p in classifier.parameters()))
