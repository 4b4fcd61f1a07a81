"""Accumulation in an inner loop; the held-out loss has the name of the training loss.

Expected: loss/train is the value printed as `train` (the last micro-batch's), logged before the
evaluation takes the name; loss/val is what `val` prints.
"""
import torch
from torch import nn

K, EVERY = 2, 3
torch.manual_seed(42)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
optim = torch.optim.Adam(model.parameters(), lr=1e-2)


def endless(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(rows, 4, generator=generator)
        yield x, x.sum(1, keepdim=True)


train_batches, held_out = endless(8, 1), endless(16, 2)
for i in range(8):
    model.train()
    for _ in range(K):
        x, y = next(train_batches)
        loss = nn.functional.mse_loss(model(x), y)
        (loss / K).backward()
    print("train", i, loss.item())
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optim.step()
    optim.zero_grad()
    if i % EVERY == 0:
        model.eval()
        with torch.no_grad():
            x, y = next(held_out)
            loss = nn.functional.mse_loss(model(x), y)
            print("val", i, loss.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
