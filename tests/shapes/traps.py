"""Traps: names `obs` and `time` are taken, an import in a function, `.step` of other things."""
import torch
from torch import nn


class Progress:
    def __init__(self):
        self.n = 0

    def step(self, n=1):
        self.n += n


class Backward:
    def backward(self, grad):
        return grad


def fit(obs, targets):
    import math
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    profiler, progress, custom = Progress(), Progress(), Backward()
    trainer = torch.optim.Adam([{"params": model[0].parameters()},
                                {"params": model[2].parameters(), "lr": 0.02}], lr=0.01)
    total = sum(p.numel() for p in model.parameters())
    best: float = math.inf
    for round in range(3):
        for start in range(0, len(obs), 8):
            x, y = obs[start:start + 8], targets[start:start + 8]
            custom.backward(x)
            if start == 16:
                progress.step()
                continue
            loss = nn.functional.mse_loss(
                model(x),
                y,
            )
            trainer.zero_grad()
            loss.backward()
            trainer.step()
            profiler.step()
            best = min(best, loss.item())
            message = """
            a line that ends like a step:
    trainer.step()
"""
    print(best, total, profiler.n, progress.n, len(message))
    return model


if __name__ == "__main__":
    torch.manual_seed(26)
    net = fit(torch.randn(40, 4), torch.randn(40, 1))
    print("final", sum(p.double().sum().item() for p in net.parameters()))
