"""An engine: `train_one_epoch` is called by another file, for which the lines at the end stand."""
import math

import torch
from torch import nn


class NativeScaler:
    def __call__(self, loss, optimizer, parameters=None, update_grad=True):
        loss.backward()
        if update_grad:
            optimizer.step()

    def state_dict(self):
        return {}


def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, accumulate):
    model.train()
    optimizer.zero_grad()
    for data_iter_step, (samples, targets) in enumerate(data_loader):
        samples = samples.to(device)
        loss = nn.functional.mse_loss(model(samples), targets)
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise SystemExit(1)
        loss /= accumulate
        loss_scaler(loss, optimizer, parameters=model.parameters(),
                    update_grad=(data_iter_step + 1) % accumulate == 0)
        if (data_iter_step + 1) % accumulate == 0:
            optimizer.zero_grad()
        print("micro", epoch, data_iter_step, loss_value)
    return {"train_loss": loss_value}


# --- main.py, which imports the engine
def call(function, *arguments):
    return function(*arguments)


torch.manual_seed(42)
net = nn.Linear(4, 1)
sgd = torch.optim.SGD(net.parameters(), lr=0.1)
batches = [(torch.randn(3, 4), torch.randn(3, 1)) for _ in range(4)]
for number in range(2):
    call(train_one_epoch, net, batches, sgd, "cpu", number, NativeScaler(), 2)
print("final", sum(p.double().sum().item() for p in net.parameters()))
