"""Several processes on one shared model, an optimizer each: a race by design."""
import torch
import torch.multiprocessing as mp
from torch import nn, optim


def train(rank, model, epochs):
    torch.manual_seed(1 + rank)
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    optimizer = optim.SGD(model.parameters(), lr=1e-2)
    for epoch in range(1, epochs + 1):
        for start in range(0, 32, 8):
            data, target = x[start:start + 8], y[start:start + 8]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(data), target)
            loss.backward()
            optimizer.step()
        print(rank, epoch, loss.item())


if __name__ == '__main__':
    torch.manual_seed(1)
    model = nn.Linear(4, 1)
    model.share_memory()
    processes = []
    for rank in range(2):
        p = mp.Process(target=train, args=(rank, model, 2))
        p.start()
        processes.append(p)
    for p in processes:
        p.join()
    print("final", sum(p.double().sum().item() for p in model.parameters()))
