"""Accumulation with a modulo, the loss divided, a second step after the loop for what remains."""
import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train_epoch(epoch, loader, iters, start_step=0):
    for step, (X, Y) in enumerate(loader, start=start_step + 1):
        X = X.to(args.device)
        Y = Y.to(args.device)
        logits = model(X)
        loss = nn.functional.cross_entropy(logits.view(-1, 20), Y.view(-1))
        loss = loss / args.accumulation_steps
        scaler.scale(loss).backward()

        if step % args.accumulation_steps == 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        if step % args.log_interval == 0 or step == iters:
            current_loss = loss.item() * args.accumulation_steps
            print(f"epoch {epoch} [{step}/{iters}] loss {current_loss:.4f}")

        del X, Y, logits, loss

    if step % args.accumulation_steps != 0:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--accumulation_steps", type=int, default=3)
    parser.add_argument("--log_interval", type=int, default=5)
    parser.add_argument("--device", type=str, default="cpu")
    args = parser.parse_args()
    torch.manual_seed(42)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Dropout(0.1), nn.Linear(8, 20))
    data = torch.randint(20, (44, 7))
    loader = DataLoader(TensorDataset(data[:, :-1], data[:, 1:]), batch_size=4, shuffle=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(args.epochs):
        train_epoch(epoch, loader, len(loader))
    print("final", sum(p.double().sum().item() for p in model.parameters()))
