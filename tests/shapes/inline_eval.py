"""Evaluation written out in the loop, `model.eval()` … `model.train()` around it, twice."""
import torch
from torch import nn

torch.manual_seed(18)
train_set = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
train_loader = torch.utils.data.DataLoader(train_set, batch_size=8, shuffle=True)
val_loader = torch.utils.data.DataLoader(train_set, batch_size=20)
model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 1))
criterion = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
train_losses, val_losses = [], []
for epoch in range(3):
    model.train()
    train_loss = 0.0
    for data, target in train_loader:
        optimizer.zero_grad()
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        optimizer.step()
        train_loss += loss.item() * data.size(0)
    model.eval()
    val_loss = 0.0
    with torch.no_grad():
        for data, target in val_loader:
            output = model(data)
            loss = criterion(output, target)
            val_loss += loss.item() * data.size(0)
    val_loss /= len(val_loader.dataset)
    train_losses.append(train_loss / 40)
    val_losses.append(val_loss)
    print(f"epoch {epoch} train {train_losses[-1]:.4f} val {val_loss:.4f}")
model.eval()
with torch.no_grad():
    test_loss = criterion(model(train_set.tensors[0]), train_set.tensors[1])
print("final", sum(p.double().sum().item() for p in model.parameters()), test_loss.item(), val_losses)
