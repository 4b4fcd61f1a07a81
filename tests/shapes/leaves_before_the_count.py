"""A loop that may return between the step of the optimizer and the count of it."""
import torch
from torch import nn


class TrainLoop:
    def __init__(self, model, data, stop_at=None):
        self.model, self.data, self.stop_at = model, data, stop_at
        self.opt = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.step = 0

    def run_loop(self):
        while self.step < 8:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self.step % 3 == 0:
                if self.stop_at and self.step > 0:
                    return
            self.step += 1

    def run_step(self, batch, cond):
        self.forward_backward(batch, cond)
        self.opt.step()

    def forward_backward(self, batch, cond):
        self.opt.zero_grad()
        losses = nn.functional.mse_loss(self.model(batch), cond, reduction="none")
        loss = losses.mean()
        print("seen", self.step + 1, loss.item())
        loss.backward()


def batches():
    while True:
        yield torch.randn(3, 4), torch.randn(3, 1)


torch.manual_seed(42)
net = nn.Linear(4, 1)
TrainLoop(net, batches(), stop_at=3).run_loop()
print("final", sum(p.double().sum().item() for p in net.parameters()))
