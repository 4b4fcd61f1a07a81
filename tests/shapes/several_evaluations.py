"""The training loss evaluated beside the validation's, an average's too, and a test at the end."""
import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    losses = [nn.functional.mse_loss(model(x), y).item() for x, y in loader]
    model.train()
    return sum(losses) / len(losses)


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    val_loader = DataLoader(TensorDataset(torch.randn(12, 4), torch.randn(12, 1)), batch_size=4)
    ema = copy.deepcopy(model)
    step = 0
    for epoch in range(2):
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for average, current in zip(ema.parameters(), model.parameters()):
                    average.mul_(0.9).add_(current, alpha=0.1)
            step += 1
            print("train", step, loss.item())
        train_loss = evaluate(model, loader)
        val_loss = evaluate(model, val_loader)
        ema_loss = evaluate(ema, val_loader)
        print("epoch", epoch, train_loss, ema_loss)
        print("val", step, val_loss)
    test_loss = evaluate(model, val_loader)
    print("test", test_loss)
    print("final", sum(p.double().sum().item() for p in model.parameters()))


main()
