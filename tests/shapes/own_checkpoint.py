"""A checkpoint dict that the script saves itself, and its own `--resume`."""
import argparse
import os
import tempfile

import torch
from torch import nn


class AverageMeter:
    def __init__(self):
        self.sum, self.count, self.avg = 0.0, 0, 0.0

    def update(self, val, n=1):
        self.sum, self.count = self.sum + val * n, self.count + n
        self.avg = self.sum / self.count


best_acc1 = 0


def train(train_loader, model, criterion, optimizer, epoch):
    losses = AverageMeter()
    model.train()
    for i, (images, target) in enumerate(train_loader):
        images = images.to("cpu", non_blocking=True)
        output = model(images)
        loss = criterion(output, target)
        losses.update(loss.item(), images.size(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(epoch, losses.avg)


def validate(val_loader, model, criterion):
    losses = AverageMeter()
    top1 = AverageMeter()
    model.eval()
    with torch.no_grad():
        for i, (images, target) in enumerate(val_loader):
            output = model(images)
            losses.update(criterion(output, target).item(), images.size(0))
            top1.update((output.argmax(1) == target).float().mean().item(), images.size(0))
    print(f"acc {top1.avg:.3f} loss {losses.avg:.4f}")
    return top1.avg


def main():
    global best_acc1
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", default="")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--start-epoch", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(23)
    dataset = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randint(2, (40,)))
    train_loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 2))
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    if args.resume:
        checkpoint = torch.load(args.resume)
        args.start_epoch = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(args.start_epoch, args.epochs):
            train(train_loader, model, criterion, optimizer, epoch)
            acc1 = validate(train_loader, model, criterion)
            scheduler.step()
            is_best = acc1 > best_acc1
            best_acc1 = max(acc1, best_acc1)
            if is_best:
                torch.save({"epoch": epoch + 1, "state_dict": model.state_dict(),
                            "optimizer": optimizer.state_dict()}, os.path.join(folder, "ckpt.pt"))
    print("final", sum(p.double().sum().item() for p in model.parameters()), best_acc1)


if __name__ == "__main__":
    main()
