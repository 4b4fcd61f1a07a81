"""A model that holds its own optimizer and is trained by a method that the loop calls."""
import torch
from torch import nn


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.data = []
        self.fc = nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        self.count = 0

    def forward(self, x):
        return self.fc(x)

    def put_data(self, item):
        self.data.append(item)

    def train_net(self):
        x = torch.stack(self.data)
        self.data = []
        loss = (self(x) - x.sum(1, keepdim=True)).abs()
        self.optimizer.zero_grad()
        loss.mean().backward()
        self.optimizer.step()
        self.count += 1
        print("loss", self.count, loss.mean().item())


def main():
    torch.manual_seed(42)
    model = ActorCritic()
    score = 0.0
    for n_epi in range(3):
        done = False
        turns = 0
        while not done:
            for t in range(4):
                model.put_data(torch.randn(4))
            turns += 1
            done = turns == 2
            score += 1.0
            model.train_net()
    print("final", score, sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    main()
