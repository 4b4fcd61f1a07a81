"""`fabric.setup_optimizers`, `fabric.backward`; the fabric is a small one written here."""
import torch
from torch import nn


class Fabric:
    def setup(self, model):
        return model

    def setup_optimizers(self, optimizer):
        return optimizer

    def backward(self, loss):
        loss.backward()


def train(fabric, model, optimizer, steps):
    iter_num = 0
    while iter_num < steps:
        x = torch.randn(8, 4)
        loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        iter_num += 1
        if iter_num % 4 == 0:
            val_loss = validate(model)
            print(iter_num, val_loss.item())


@torch.no_grad()
def validate(model):
    model.eval()
    x = torch.linspace(-1, 1, 16).view(4, 4)
    out = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
    model.train()
    return out


if __name__ == "__main__":
    torch.manual_seed(11)
    fabric = Fabric()
    model = fabric.setup(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1)))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.01))
    train(fabric, model, optimizer, 12)
    print("final", sum(p.double().sum().item() for p in model.parameters()))
