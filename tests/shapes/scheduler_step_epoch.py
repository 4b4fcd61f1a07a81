"""A function per epoch, in a loop that tells its scheduler the number of the epoch."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(epoch):
    net.train()
    for i, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss = loss_function(net(x), y)
        loss.backward()
        optimizer.step()
        print("train", (epoch - 1) * len(loader) + i + 1, loss.item())


@torch.no_grad()
def evaluate(epoch):
    net.eval()
    test_loss = 0.0
    for x, y in held_out:
        test_loss += loss_function(net(x), y).item()
    print("val", epoch * len(loader), test_loss / len(held_out))
    return test_loss


if __name__ == "__main__":
    torch.manual_seed(42)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    loader = DataLoader(TensorDataset(torch.randn(24, 4), torch.randn(24, 1)), batch_size=6)
    held_out = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=4)
    loss_function = nn.MSELoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 3], gamma=0.2)
    for epoch in range(1, 4):
        if epoch > 1:
            train_scheduler.step(epoch)
        train(epoch)
        evaluate(epoch)
    print("final", sum(p.double().sum().item() for p in net.parameters()))
