"""Sharpness-aware: two forwards and two backwards a step."""
import torch
from torch import nn


class SAM(torch.optim.Optimizer):
    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, dict(rho=rho, **kwargs))
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["e_w"] = p.grad * group["rho"]
                p.add_(self.state[p]["e_w"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


torch.manual_seed(19)
model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.1), nn.Linear(6, 2))
optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05)
dataset = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randint(2, (24,)))
train = torch.utils.data.DataLoader(dataset, batch_size=6, shuffle=True)
for epoch in range(3):
    model.train()
    for batch in train:
        inputs, targets = (b for b in batch)
        predictions = model(inputs)
        loss = nn.functional.cross_entropy(predictions, targets, reduction="none")
        loss.mean().backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)
    print(epoch, loss.mean().item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
