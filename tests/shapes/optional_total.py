"""A sum over the epoch that is made, added to and printed under the same flag."""
import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quiet", dest="tracking", action="store_false")
    args = parser.parse_args()
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = 0
    for epoch in range(3):
        if args.tracking:
            total_loss = 0
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            if args.tracking:
                total_loss += loss.detach().float()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            print("train", step, loss.item())
        if args.tracking:
            print("mean", epoch, total_loss.item() / len(loader))
    print("final", sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    main()
