"""A function per epoch, each time with an optimizer of its own; the caller evaluates."""
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(42)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
loader = DataLoader(TensorDataset(torch.randn(32, 4), torch.randn(32, 1)), batch_size=4, shuffle=True)
valid = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 1)), batch_size=4)
loss_fn = nn.functional.mse_loss
seen = 0


def train_model(model, loader):
    global seen
    total = 0.0
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for x, y in loader:
        optim.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optim.step()
        seen += 1
        print("train", seen, loss.item())
        total += loss.item()
    return total / len(loader)


def eval_model(model, loader):
    model.eval()
    with torch.no_grad():
        return sum(loss_fn(model(x), y).item() for x, y in loader) / len(loader)


for epoch in range(2):
    train_loss = train_model(model, loader)
    val_loss = eval_model(model, valid)
    print("val", seen, val_loss)
test_loss = eval_model(model, valid)
print("test", test_loss)
print("final", sum(p.double().sum().item() for p in model.parameters()))
