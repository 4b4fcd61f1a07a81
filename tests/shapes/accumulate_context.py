"""An engine that steps only where the gradients are whole, as accelerate's does."""
import contextlib

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Engine:
    """As far as this script needs it."""

    def __init__(self, steps):
        self.steps, self.count, self.sync_gradients = steps, 0, False

    @contextlib.contextmanager
    def accumulate(self, model):
        self.count += 1
        self.sync_gradients = self.count % self.steps == 0
        yield

    def backward(self, loss):
        (loss / self.steps).backward()

    def prepare(self, optimizer):
        return Gated(self, optimizer)


class Gated(torch.optim.Optimizer):
    def __init__(self, engine, optimizer):
        self.engine, self.optimizer = engine, optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def step(self):
        if self.engine.sync_gradients:
            self.optimizer.step()

    def zero_grad(self):
        if self.engine.sync_gradients:
            self.optimizer.zero_grad()


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = Engine(2)
    optimizer = accelerator.prepare(optimizer)
    step = 0
    for epoch in range(2):
        accelerator.count = 0
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                print("train", step, loss.item())
        optimizer.optimizer.zero_grad()
    print("final", sum(p.double().sum().item() for p in model.parameters()))


main()
