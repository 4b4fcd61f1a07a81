"""After nanoGPT: a batch fetched ahead, a loop without an end."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

import time
from contextlib import nullcontext
def get_batch(split):
    ix = torch.randint(17, (4,))
    return data[ix]
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
scaler = torch.amp.GradScaler("cpu", enabled=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
iter_num, best_val_loss, max_iters, eval_interval, always_save_checkpoint = 0, 1e9, 15, 4, False
@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ["train", "val"]:
        losses = torch.zeros(2)
        for k in range(2):
            X, Y = get_batch(split)
            losses[k] = (model(X) - Y).square().mean().item()
        out[split] = losses.mean()
    model.train()
    return out
X, Y = get_batch("train")
t0 = time.time()
local_iter_num = 0
raw_model = model
running_mfu = -1.0
obs.init("run")
obs.watch(model, optimizer=optimizer, scaler=scaler)
X, Y, iter_num, best_val_loss, local_iter_num, running_mfu = obs.resume(
    X=X, Y=Y, iter_num=iter_num, best_val_loss=best_val_loss, local_iter_num=local_iter_num,
    running_mfu=running_mfu)
while True:
    if obs.ended(): break
    lr = 0.01 * (1 - iter_num / 20)
    for param_group in optimizer.param_groups: param_group["lr"] = lr
    if iter_num % eval_interval == 0:
        losses = estimate_loss()
        if losses["val"] < best_val_loss or always_save_checkpoint:
            best_val_loss = losses["val"]
    for micro_step in range(2):
        with nullcontext():
            loss = (model(X) - Y).square().mean() / 2
        X, Y = get_batch("train")
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    t1 = time.time()
    dt = t1 - t0
    t0 = t1
    if iter_num % 2 == 0:
        lossf = loss.item() * 2
        if local_iter_num >= 5:
            mfu = lossf
            running_mfu = mfu if running_mfu == -1.0 else 0.9 * running_mfu + 0.1 * mfu
        print(f"iter {iter_num}: loss {lossf:.4f}, mfu {running_mfu*100:.2f}%")
    iter_num += 1
    local_iter_num += 1
    obs.step(iter_num, loss=loss, last=iter_num > 14)
    if iter_num > 14:
        break
obs.finish()
final(model, best_val_loss, running_mfu)
