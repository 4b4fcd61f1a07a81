"""As transformers' examples: batches as dicts, tied weights, constant buffers."""
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

class Output(dict):
    __getattr__ = dict.__getitem__
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"hidden": 8, "use_cache": False}
        self.embed, self.drop, self.head = nn.Embedding(11, 8), nn.Dropout(0.1), nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.gradient_checkpointing = False
        self.register_buffer("inv_freq", 1.0 / torch.arange(1, 9), persistent=False)
        self.register_buffer("mask", torch.ones(6, 6).tril(), persistent=False)
    def forward(self, input_ids, labels=None, **_):
        logits = self.head(self.drop(self.embed(input_ids)) * self.inv_freq)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss=loss, logits=logits)
tokens = torch.randint(11, (20, 6))
def collate(items):
    ids = torch.stack(items)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
train_dataloader = DataLoader(tokens, shuffle=True, collate_fn=collate, batch_size=4, drop_last=True)
eval_dataloader = DataLoader(tokens, collate_fn=collate, batch_size=10)
model = Model()
no_decay = [p for n, p in model.named_parameters() if "bias" in n]
decay = [p for n, p in model.named_parameters() if "bias" not in n]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-2)
lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 4))
completed_steps = 0
obs.init("run")
obs.watch(model, optimizer=optimizer, scheduler=lr_scheduler)
completed_steps = obs.resume(completed_steps=completed_steps)
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    model.train()
    total_loss = 0
    for step, batch in enumerate(train_dataloader):
        if obs.skip_batch(): continue
        outputs = model(**batch)
        loss = outputs.loss
        total_loss += loss.detach().float()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        completed_steps += 1
        obs.step(completed_steps, loss=loss, batch=batch)
    model.eval()
    losses = [model(**batch).loss for batch in eval_dataloader]
    obs.validation(torch.stack(losses).mean())
obs.finish()
final(model, lr_scheduler.state_dict())
