"""`optimizer, scheduler = build_optimizer(...)`, the model from a factory too."""
import torch
from torch import nn


def build_model():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 2))


def build_optimizer(model, lr, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    return optimizer, scheduler


def evaluate(model, loader, criterion):
    model.eval()
    correct, total_loss = 0, 0.0
    with torch.no_grad():
        for x, y in loader:
            out = model(x)
            total_loss += criterion(out, y).item()
            correct += (out.argmax(1) == y).sum().item()
    model.train()
    return total_loss / len(loader), correct / len(loader.dataset)


def main():
    torch.manual_seed(14)
    data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randint(2, (40,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    criterion = nn.CrossEntropyLoss()
    model = build_model()
    optimizer, scheduler = build_optimizer(model, 0.01, 15)
    best_acc, patience = 0.0, 0
    history = {"val": []}
    for epoch in range(3):
        epoch_loss = 0.0
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            epoch_loss += loss.item()
        val, acc = evaluate(model, loader, criterion)
        history["val"].append(val)
        if acc > best_acc:
            best_acc, patience = acc, 0
        else:
            patience += 1
        print(epoch, epoch_loss / len(loader), val, acc, best_acc, patience)
    print("final", sum(p.double().sum().item() for p in model.parameters()), history)


if __name__ == "__main__":
    main()
