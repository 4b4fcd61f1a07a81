"""A scaler used or not by a flag, both branches in the file; the model wrapped after the optimizer."""
import torch
from torch import nn


def main(use_amp=False, distributed=False):
    torch.manual_seed(20)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu") if use_amp else None
    model_without_ddp = model
    if distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
        model_without_ddp = model.module
    data_loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(2, (32,))), batch_size=8,
        shuffle=True)
    criterion = nn.CrossEntropyLoss()
    for epoch in range(3):
        for i, (image, target) in enumerate(data_loader):
            optimizer.zero_grad()
            if scaler is not None:
                with torch.autocast("cpu"):
                    loss = criterion(model(image), target)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                output = model(image)
                loss = criterion(output, target)
                loss.backward()
                optimizer.step()
            if not torch.isfinite(loss):
                print("diverged"); break
        print(epoch, image.shape[0])
    print("final", sum(p.double().sum().item() for p in model_without_ddp.parameters()))


if __name__ == "__main__":
    main()
