"""Two kinds of model in one loop: each branch of an `if` has its own backward and step."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


DEEP = {"deep"}


class Trainer:
    def __init__(self, kind, accumulation):
        torch.manual_seed(42)
        self.config, self.accumulation = {"kind": kind}, accumulation
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        data = TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
        self.loader = DataLoader(data, batch_size=4, shuffle=True)
        self.updates = 0

    def train_epoch(self):
        for i, (x, y) in enumerate(self.loader):
            self.model.train()
            if self.config["kind"] in DEEP:
                loss = nn.functional.mse_loss(self.model(x), y)
                loss.backward()
                if (i + 1) % self.accumulation == 0:
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.updates += 1
            else:
                self.optimizer.zero_grad()
                loss = nn.functional.l1_loss(self.model(x), y)
                loss.backward()
                self.optimizer.step()
                self.updates += 1
            if self.updates % 2 == 1:
                self.model.eval()
                print("seen", i, self.updates)

    def train(self, epochs):
        for epoch in range(epochs):
            self.train_epoch()


trainer = Trainer("plain", 2)
trainer.train(2)
print("final", sum(p.double().sum().item() for p in trainer.model.parameters()))
