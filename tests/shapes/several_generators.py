"""Two generators, two discriminators; the printed losses are the generators' and a mean of two.

Expected: `loss=loss_G` (printed as it is) with `loss_D_A` and `loss_D_B` beside it, or
`loss=loss_D`; not `loss=loss_D_B`, which the script never shows.
"""
import torch
from torch import nn

torch.manual_seed(42)
G_AB, G_BA, D_A, D_B = (nn.Linear(3, n) for n in (3, 3, 1, 1))
mse, l1 = nn.MSELoss(), nn.L1Loss()
optimizer_G = torch.optim.Adam([*G_AB.parameters(), *G_BA.parameters()], lr=0.01)
optimizer_D_A = torch.optim.Adam(D_A.parameters(), lr=0.01)
optimizer_D_B = torch.optim.Adam(D_B.parameters(), lr=0.01)
batches = [{"A": torch.randn(4, 3), "B": torch.randn(4, 3)} for _ in range(4)]
for epoch in range(2):
    for i, batch in enumerate(batches):
        real_A, real_B = batch["A"], batch["B"]
        valid, fake = torch.ones(4, 1), torch.zeros(4, 1)
        optimizer_G.zero_grad()
        fake_B, fake_A = G_AB(real_A), G_BA(real_B)
        loss_GAN = mse(D_B(fake_B), valid) + mse(D_A(fake_A), valid)
        loss_G = loss_GAN + l1(G_BA(fake_B), real_A) + l1(G_AB(fake_A), real_B)
        loss_G.backward()
        optimizer_G.step()
        optimizer_D_A.zero_grad()
        loss_D_A = (mse(D_A(real_A), valid) + mse(D_A(fake_A.detach()), fake)) / 2
        loss_D_A.backward()
        optimizer_D_A.step()
        optimizer_D_B.zero_grad()
        loss_D_B = (mse(D_B(real_B), valid) + mse(D_B(fake_B.detach()), fake)) / 2
        loss_D_B.backward()
        optimizer_D_B.step()
        loss_D = (loss_D_A + loss_D_B) / 2
        print("train", epoch * len(batches) + i + 1, loss_G.item(), "D", loss_D.item())
print("final", sum(p.double().sum().item() for p in G_AB.parameters()))
