"""Full batch; `test()` returns scores of three splits, and a pair of scores of another kind.

Expected: no `loss/val` at all (nothing here is a validation loss: average precision rises);
`val_acc` is recorded under val/, `train_acc` never under val/; `ap` and `val_f1` are recorded as
scores; the step line has no `batch=` made of a score.
"""
import torch
from torch import nn


def train():
    model.train()
    optimizer.zero_grad()
    out = model(x)
    loss = nn.functional.cross_entropy(out[train_mask], y[train_mask])
    loss.backward()
    optimizer.step()
    return float(loss)


@torch.no_grad()
def test():
    model.eval()
    right = model(x).argmax(1) == y
    return [float(right[m].double().mean()) for m in (train_mask, val_mask, test_mask)]


@torch.no_grad()
def rank(mask):
    p = model(x[mask]).softmax(1)[:, 1]
    return float(p.mean()), float(p.max())


@torch.no_grad()
def f1(mask):
    return float((model(x[mask]).argmax(1) * y[mask]).double().mean())


torch.manual_seed(42)
x = torch.randn(60, 4)
y = (x[:, 0] > 0).long()
index = torch.arange(60)
train_mask, val_mask, test_mask = index < 20, (index >= 20) & (index < 40), index >= 40
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
best_val_acc = final = 0
for epoch in range(1, 7):
    loss = train()
    train_acc, val_acc, tmp_test_acc = test()
    auc, ap = rank(val_mask)
    val_f1 = f1(val_mask)
    if val_acc > best_val_acc:
        best_val_acc, final = val_acc, tmp_test_acc
    print(f"Epoch {epoch}, Loss: {loss}, Train: {train_acc}, Val: {val_acc}, AP: {ap}, F1: {val_f1}")
print("final", final, sum(p.double().sum().item() for p in model.parameters()))
