"""Accumulation by an inner loop with `require_backward_grad_sync`; the loss summed up by hand."""
import torch
from torch import nn

torch.manual_seed(21)
model = nn.Sequential(nn.Embedding(25, 8), nn.Dropout(0.1), nn.Linear(8, 25))
optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.01)]
schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 1 - s / 20) for opt in optimizers]
tokens = torch.randint(25, (400,))
position = 0
grad_accum_steps = 2
for step in range(11):
    last_step = step == 10
    if step % 5 == 0 or last_step:
        model.eval()
        with torch.no_grad():
            val_loss = nn.functional.cross_entropy(model(tokens[:64]), tokens[1:65])
        model.train()
        print(f"step {step} val loss {val_loss.item():.4f}")
    if last_step:
        break
    train_loss = 0.0
    for micro_step in range(grad_accum_steps):
        model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
        x = tokens[position:position + 16]
        y = tokens[position + 1:position + 17]
        position += 16
        loss = nn.functional.cross_entropy(model(x), y)
        loss = loss / grad_accum_steps
        train_loss += loss.detach()
        loss.backward()
    for opt, sched in zip(optimizers, schedulers):
        opt.step()
        sched.step()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    print(f"step {step} train loss {train_loss.item():.4f}")
print("final", sum(p.double().sum().item() for p in model.parameters()))
