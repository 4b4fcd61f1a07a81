"""`accelerator.prepare`, `accelerator.backward`; the accelerator is a small one written here."""
import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Accelerator:
    def prepare(self, *things):
        return things

    def backward(self, loss):
        loss.backward()

    def gather(self, x):
        return x


def main():
    accelerator = Accelerator()
    torch.manual_seed(6)
    data = TensorDataset(torch.randn(24, 4), torch.randn(24, 1))
    train_dataloader = DataLoader(data, shuffle=True, batch_size=4)
    eval_dataloader = DataLoader(data, batch_size=8)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.95 ** s)
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    completed_steps = 0
    accumulation, max_train_steps = 2, 8
    for epoch in range(3):
        model.train()
        for step, batch in enumerate(train_dataloader):
            loss = nn.functional.mse_loss(model(batch[0]), batch[1])
            loss = loss / accumulation
            accelerator.backward(loss)
            if step % accumulation == 0 or step == len(train_dataloader) - 1:
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                completed_steps += 1

            if completed_steps >= max_train_steps:
                break

        model.eval()
        losses = []
        for step, batch in enumerate(eval_dataloader):
            with torch.no_grad():
                eval_batch_loss = nn.functional.mse_loss(model(batch[0]), batch[1])
            losses.append(accelerator.gather(eval_batch_loss.repeat(8)))
        losses = torch.cat(losses)
        eval_loss = torch.mean(losses)
        try:
            perplexity = math.exp(eval_loss)
        except OverflowError:
            perplexity = float("inf")
        print(f"epoch {epoch}: perplexity: {perplexity} eval_loss: {eval_loss}")
    print("final", sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    main()
