"""One `main()`, two nested loops, `evaluate()` as a closure, a progress bar around the range."""
import time

import torch
from torch import nn


def tqdm(iterable, **options):
    return iterable


def next_batch(ids, ptr, size):
    if ptr + size + 1 > len(ids):
        ptr = 0
    span = ids[ptr:ptr + size + 1]
    return span[:-1].view(2, -1), span[1:].view(2, -1), ptr + size


def main():
    torch.manual_seed(1337)
    ids = torch.randint(30, (300,))
    batches, epochs, size = 7, 3, 32
    model = nn.Sequential(nn.Embedding(30, 8), nn.Dropout(0.1), nn.Linear(8, 30))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=batches * epochs)

    def evaluate():
        model.eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, 200, 50):
                x, y = ids[start:start + 50], ids[start + 1:start + 51]
                total += nn.functional.cross_entropy(model(x), y, reduction="sum").item()
        model.train()
        return total / 200

    ptr = 0
    step = 0
    t0 = time.time()
    for epoch in range(1, epochs + 1):
        for _ in tqdm(range(1, batches + 1), desc=f"epoch {epoch}"):
            step += 1
            xb, yb, ptr = next_batch(ids, ptr, size)
            logits = model(xb)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), yb.flatten())
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            elapsed = time.time() - t0
            if step == 1 or step % 5 == 0:
                val_loss = evaluate()
                print(f"step {step} val {val_loss:.6f}", "slow" if elapsed > 600 else "")
    print("final", sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    main()
