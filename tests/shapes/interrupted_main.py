"""Trained in a try, and evaluated once more behind it; two values of an evaluation."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def validate(model, loader):
    model.eval()
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x), y).item() for x, y in loader]
    model.train()
    return sum(losses) / len(losses), len(losses)


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = 0
    try:
        for epoch in range(2):
            for x, y in loader:
                loss = nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                print("train", step, loss.item())
            vl, acc = validate(model, loader)
            print("val", step, vl)
    except KeyboardInterrupt:
        print("stopped")
    test_loss, count = validate(model, loader)
    print("test", test_loss, count)
    print("final", sum(p.double().sum().item() for p in model.parameters()))


main()
