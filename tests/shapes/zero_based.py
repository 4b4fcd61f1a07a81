"""Steps counted from zero, evaluated in line, the first one before anything is learnt."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


torch.manual_seed(42)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
x, y = torch.randn(44, 4), torch.randn(44, 1)
held_out = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 1)), batch_size=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(8):
    if step % 3 == 0:
        model.eval()
        with torch.no_grad():
            val_loss_accum = 0.0
            for xv, yv in held_out:
                val_loss_accum += nn.functional.mse_loss(model(xv), yv) / len(held_out)
        print("val", step, val_loss_accum.item())
        model.train()
    rows = torch.randint(44, (4,))
    loss = nn.functional.mse_loss(model(x[rows]), y[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("train", step, loss.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
