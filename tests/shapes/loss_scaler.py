"""One callable does backward and step: `loss_scaler(loss, optimizer, …)`."""
import torch
from torch import nn


class NativeScaler:
    def __call__(self, loss, optimizer, clip_grad=None, parameters=None):
        loss.backward()
        if clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        optimizer.step()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def train_one_epoch(model, loader, optimizer, loss_scaler, epoch):
    model.train()
    for samples, targets in loader:
        loss = nn.functional.cross_entropy(model(samples.float()), targets)
        optimizer.zero_grad()
        loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    return loss.item()


def main():
    torch.manual_seed(15)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_scaler = NativeScaler()
    for epoch in range(3):
        train_loss = train_one_epoch(model, loader, optimizer, loss_scaler, epoch)
        print(epoch, train_loss)
    print("final", sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    main()
