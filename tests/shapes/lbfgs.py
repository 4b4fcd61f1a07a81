"""LBFGS: `optimizer.step(closure)` with the backward inside the closure."""
import torch
from torch import nn, optim

torch.manual_seed(0)
x = torch.linspace(0, 1, 40).unsqueeze(1)
y = torch.sin(6 * x)
seq = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
criterion = nn.MSELoss()
optimizer = optim.LBFGS(seq.parameters(), lr=0.5, max_iter=5)
for i in range(8):
    print('STEP: ', i)

    def closure():
        optimizer.zero_grad()
        out = seq(x)
        loss = criterion(out, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        pred = seq(x[:20])
        test_loss = criterion(pred, y[:20])
        print('test loss:', test_loss.item())
print("final", sum(p.double().sum().item() for p in seq.parameters()))
