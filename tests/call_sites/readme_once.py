"""The README's example as it once was: it lacked resume() and skip_batch()."""
import torch

import observability as obs

torch.manual_seed(0)
x = torch.randn(512, 4)
y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.05)
obs.init("run", config={"lr": 0.05, "epochs": 3})
obs.watch(model, optimizer=opt)
for epoch in range(1, 4):
    if obs.skip_epoch(epoch): continue
    for at in range(0, 448, 64):
        loss = (model(x[at : at + 64]) - y[at : at + 64]).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        obs.step(loss=loss, samples=64)
    with torch.no_grad():
        val_loss = (model(x[448:]) - y[448:]).square().mean()
    obs.validation(val_loss)
obs.finish()
final(model)
