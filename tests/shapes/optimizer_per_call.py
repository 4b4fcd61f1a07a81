"""A train() that is called per epoch, each time with an optimizer of its own."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


torch.manual_seed(42)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
loader = DataLoader(data, batch_size=4, shuffle=True)
seen = 0


def train(lr):
    global seen
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += 1
        print("train", seen, loss.item())


for epoch in range(2):
    train(0.1 / (epoch + 1))
print("final", sum(p.double().sum().item() for p in model.parameters()))
