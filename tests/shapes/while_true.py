"""Module level, `while True` with a break on the step count, a configuration that is exec-ed."""
import os
from contextlib import nullcontext

import torch
from torch import nn

max_iters = 12
eval_interval = 4
batch_size = 4
block_size = 8
learning_rate = 1e-2
gradient_accumulation_steps = 2
compile = False
# -----------------------------------------------------------------------------
config_keys = [k for k, v in globals().items() if not k.startswith("_") and isinstance(v, (int, float))]
if os.path.exists("configurator.txt"):
    exec(open("configurator.txt").read())
config = {k: globals()[k] for k in config_keys}
# -----------------------------------------------------------------------------
torch.manual_seed(1337)
data = torch.randint(50, (500,))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50)
        self.drop = nn.Dropout(0.1)

    def forward(self, x, y):
        logits = self.head(self.drop(self.emb(x)))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, lr):
        return torch.optim.AdamW(self.parameters(), lr=lr)


def get_batch(split):
    ix = torch.randint(len(data) - block_size - 1, (batch_size,))
    x = torch.stack([data[i:i + block_size] for i in ix])
    y = torch.stack([data[i + 1:i + 1 + block_size] for i in ix])
    return x, y


iter_num = 0
best_val_loss = 1e9
if learning_rate > 0:
    model = Tiny()
elif learning_rate < 0:
    model = Tiny()
model.to("cpu")
scaler = torch.amp.GradScaler("cpu", enabled=False)
optimizer = model.configure_optimizers(learning_rate)
ctx = nullcontext()


@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ["train", "val"]:
        losses = torch.zeros(3)
        for k in range(3):
            X, Y = get_batch(split)
            with ctx:
                logits, loss = model(X, Y)
            losses[k] = loss.item()
        out[split] = losses.mean()
    model.train()
    return out


def get_lr(it):
    return learning_rate * (1 - it / (max_iters + 1))


X, Y = get_batch("train")  # the very first batch
while True:

    lr = get_lr(iter_num)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr

    if iter_num % eval_interval == 0:
        losses = estimate_loss()
        print(f"step {iter_num}: train {losses['train']:.4f}, val {losses['val']:.4f}")
        if losses["val"] < best_val_loss:
            best_val_loss = losses["val"]

    for micro_step in range(gradient_accumulation_steps):
        with ctx:
            logits, loss = model(X, Y)
            loss = loss / gradient_accumulation_steps
        X, Y = get_batch("train")
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1

    # termination conditions
    if iter_num >= max_iters:
        break

print("final", sum(p.double().sum().item() for p in model.parameters()))
