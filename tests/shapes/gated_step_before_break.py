"""`with accelerator.accumulate(model)`, and a limit of steps by a `break` further down."""
import contextlib

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Accelerator:
    def __init__(self, gradient_accumulation_steps):
        self.every, self.seen, self.sync_gradients = gradient_accumulation_steps, 0, False

    @contextlib.contextmanager
    def accumulate(self, model):
        self.seen += 1
        self.sync_gradients = self.seen % self.every == 0
        yield

    def backward(self, loss):
        (loss / self.every).backward()


torch.manual_seed(42)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
loader = DataLoader(TensorDataset(torch.randn(44, 4), torch.randn(44, 1)), batch_size=4, shuffle=True)
inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
completed_steps = 0
for epoch in range(2):
    for batch in loader:
        with accelerator.accumulate(model):
            x, y = batch
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                inner.step()
                inner.zero_grad()
        if accelerator.sync_gradients:
            completed_steps += 1
            print("train", completed_steps, loss.item())
        if completed_steps >= 5:
            break
    if completed_steps >= 5:
        break
print("final", sum(p.double().sum().item() for p in model.parameters()))
