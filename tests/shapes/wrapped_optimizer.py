"""`ScheduledOptim.step_and_update_lr()`: an optimizer inside an object of the script."""
import torch
from torch import nn, optim


class ScheduledOptim:
    def __init__(self, optimizer, d_model, warmup):
        self._optimizer, self.d_model, self.warmup, self.n_steps = optimizer, d_model, warmup, 0

    def step_and_update_lr(self):
        self.n_steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.d_model ** -0.5 * min(self.n_steps ** -0.5, self.n_steps * self.warmup ** -1.5)
        self._optimizer.step()

    def zero_grad(self):
        self._optimizer.zero_grad()


def train_epoch(model, training_data, optimizer):
    model.train()
    total_loss, n_total = 0, 0
    for src, trg in training_data:
        optimizer.zero_grad()
        pred = model(src)
        loss = nn.functional.cross_entropy(pred.view(-1, pred.size(-1)), trg.view(-1))
        loss.backward()
        optimizer.step_and_update_lr()
        total_loss += loss.item()
        n_total += trg.numel()
    return total_loss / n_total


def eval_epoch(model, validation_data):
    model.eval()
    total_loss = 0
    with torch.no_grad():
        for src, trg in validation_data:
            pred = model(src)
            total_loss += nn.functional.cross_entropy(pred.view(-1, pred.size(-1)), trg.view(-1)).item()
    return total_loss


def train(model, data, optimizer):
    valid_losses = []
    for epoch_i in range(3):
        train_loss = train_epoch(model, data, optimizer)
        valid_loss = eval_epoch(model, data)
        valid_losses += [valid_loss]
        print(epoch_i, train_loss, valid_loss, min(valid_losses))


def main():
    torch.manual_seed(16)
    tokens = torch.randint(12, (30, 6))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:]),
                                       batch_size=5, shuffle=True)
    transformer = nn.Sequential(nn.Embedding(12, 8), nn.Dropout(0.1), nn.Linear(8, 12))
    optimizer = ScheduledOptim(optim.Adam(transformer.parameters(), betas=(0.9, 0.98)), 8, 10)
    train(transformer, data, optimizer)
    print("final", sum(p.double().sum().item() for p in transformer.parameters()))


if __name__ == '__main__':
    main()
