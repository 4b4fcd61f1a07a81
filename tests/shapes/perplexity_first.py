"""An evaluation that returns a perplexity first and the loss second, and a limit of steps.

Expected: `obs.validation(eval_loss)`, never the perplexity; and the last step, after which the loop
is left by a `break`, is recorded like the others.
"""
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def evaluate(model, loader):
    model.eval()
    losses = []
    for x, y in loader:
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(model(x), y))
    eval_loss = torch.stack(losses).mean()
    return math.exp(eval_loss), eval_loss


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    held_out = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 1)), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    completed_steps = 0
    for epoch in range(2):
        model.train()
        for step, (x, y) in enumerate(loader):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            completed_steps += 1
            print("train", completed_steps, loss.item())
            if completed_steps >= 14:
                break
        perplexity, eval_loss = evaluate(model, held_out)
        print("val", completed_steps, eval_loss.item())
        print("perplexity", perplexity)
    print("final", sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    main()
