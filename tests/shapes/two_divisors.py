"""The same name is divided twice: by the micro-batches in training, by the batches in validation.

Expected: `loss=loss * micro_batches`; `loss/val` as printed. The validation's divisor is not the
training's.
"""
import torch
from torch import nn

torch.manual_seed(42)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
micro_batches = 4
fixed = torch.randn(3, 4, 4), torch.randn(3, 4, 1)
for step in range(6):
    if step % 2 == 0:
        model.eval()
        with torch.no_grad():
            val_loss_accum = 0.0
            val_batches = 3
            for i in range(val_batches):
                loss = nn.functional.mse_loss(model(fixed[0][i]), fixed[1][i])
                loss = loss / val_batches
                val_loss_accum += loss.detach()
        print("val", step, val_loss_accum.item())
    model.train()
    optimizer.zero_grad()
    for micro in range(micro_batches):
        x = torch.randn(4, 4)
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        loss = loss / micro_batches
        loss.backward()
    optimizer.step()
    print("train", step, loss.item() * micro_batches)
print("final", sum(p.double().sum().item() for p in model.parameters()))
