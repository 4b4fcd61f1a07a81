"""A Trainer class with `fit()`, `train_epoch()` and `validate()` methods, state in attributes."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Trainer:
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 2))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.9)
        data = TensorDataset(torch.randn(48, 6), torch.randint(2, (48,)))
        self.train_loader = DataLoader(data, batch_size=8, shuffle=True)
        self.val_loader = DataLoader(data, batch_size=16)
        self.global_step = 0
        self.best = float("inf")

    def train_epoch(self):
        self.model.train()
        running_loss = 0.0
        for inputs, labels in self.train_loader:
            self.optimizer.zero_grad()
            outputs = self.model(inputs)
            loss = self.criterion(outputs, labels)
            loss.backward()
            self.optimizer.step()
            self.global_step += 1
            running_loss += loss.item() * inputs.size(0)
        return running_loss / len(self.train_loader.dataset)

    def validate(self):
        self.model.eval()
        total_loss = 0.0
        with torch.no_grad():
            for inputs, labels in self.val_loader:
                total_loss += self.criterion(self.model(inputs), labels).item()
        return total_loss / len(self.val_loader)

    def fit(self, epochs):
        for epoch in range(epochs):
            train_loss = self.train_epoch()
            val_loss = self.validate()
            self.scheduler.step()
            if val_loss < self.best:
                self.best = val_loss
            print(f"epoch {epoch} train {train_loss:.4f} val {val_loss:.4f} best {self.best:.4f}")


if __name__ == "__main__":
    torch.manual_seed(7)
    trainer = Trainer()
    trainer.fit(epochs=3)
    print("final", sum(p.double().sum().item() for p in trainer.model.parameters()))
