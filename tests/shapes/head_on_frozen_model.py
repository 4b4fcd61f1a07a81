"""A frozen encoder and a head, which alone a helper gave to the optimizer."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def set_model():
    model = nn.Linear(4, 6)
    classifier = nn.Linear(6, 2)
    return model, classifier, nn.CrossEntropyLoss()


def set_optimizer(opt, model):
    return torch.optim.SGD(model.parameters(), lr=opt["lr"], momentum=0.9)


def train(train_loader, model, classifier, criterion, optimizer, epoch):
    model.eval()
    classifier.train()
    for idx, (x, y) in enumerate(train_loader):
        with torch.no_grad():
            features = model(x)
        loss = criterion(classifier(features.detach()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print("train", epoch * len(train_loader) + idx + 1, loss.item())


def main():
    torch.manual_seed(42)
    opt = {"lr": 0.1}
    data = TensorDataset(torch.randn(40, 4), torch.randint(2, (40,)))
    train_loader = DataLoader(data, batch_size=8, shuffle=True)
    model, classifier, criterion = set_model()
    optimizer = set_optimizer(opt, classifier)
    for epoch in range(3):
        train(train_loader, model, classifier, criterion, optimizer, epoch)
    print("final", sum(p.double().sum().item() for p in classifier.parameters()))


if __name__ == "__main__":
    main()
