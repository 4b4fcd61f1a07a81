"""A test that sums its losses and divides when it prints; a number per epoch."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def test(model, loader, step):
    model.eval()
    test_loss, correct = 0, 0
    with torch.no_grad():
        for x, y in loader:
            test_loss += nn.functional.mse_loss(model(x), y).item()
            correct += (model(x).sign() == y.sign()).sum().item()
    print("val", step, test_loss / len(loader))
    print("Accuracy:", 100.0 * correct / len(loader.dataset))
    model.train()


def main():
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(44, 4), torch.randn(44, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = 0
    for epoch in range(1, 3):
        for batch_idx, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            print("train", step, loss.item())
        test(model, loader, step)
    print("final", sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    main()
