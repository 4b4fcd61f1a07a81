"""An average of the weights, copied from the model before the model is wrapped."""
from collections import OrderedDict
from copy import deepcopy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@torch.no_grad()
def update_ema(ema_model, model, decay=0.9):
    ema_params = OrderedDict(ema_model.named_parameters())
    for name, param in OrderedDict(model.named_parameters()).items():
        ema_params[name].mul_(decay).add_(param.data, alpha=1 - decay)


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    ema = deepcopy(model).to("cpu")
    model = Wrapped(model.to("cpu"))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    update_ema(ema, model.module, decay=0)
    train_steps = 0
    for epoch in range(3):
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            update_ema(ema, model.module)
            train_steps += 1
            print("train", train_steps, loss.item())
    print("ema", sum(p.double().sum().item() for p in ema.parameters()))


if __name__ == "__main__":
    main()
