"""Layer-wise training, an optimizer per layer, made in the layer itself."""
import torch
from torch import nn
from torch.optim import Adam


class Net(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.layers = nn.ModuleList([Layer(a, b) for a, b in zip(dims, dims[1:])])

    def fit(self, x_pos, x_neg):
        for i, layer in enumerate(self.layers):
            print("Training layer: ", i)
            x_pos, x_neg = layer.fit(x_pos, x_neg)


class Layer(nn.Linear):
    def __init__(self, a, b):
        super().__init__(a, b)
        self.opt = Adam(self.parameters(), lr=0.03)
        self.num_epochs = 5

    def forward(self, x):
        return torch.relu(super().forward(x / (x.norm(2, 1, keepdim=True) + 1e-4)))

    def fit(self, x_pos, x_neg):
        for i in range(self.num_epochs):
            g_pos = self.forward(x_pos).pow(2).mean(1)
            g_neg = self.forward(x_neg).pow(2).mean(1)
            loss = torch.log(1 + torch.exp(torch.cat([1.5 - g_pos, g_neg - 1.5]))).mean()
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
        print(loss.item())
        return self.forward(x_pos).detach(), self.forward(x_neg).detach()


if __name__ == "__main__":
    torch.manual_seed(1234)
    net = Net([6, 8, 8])
    net.fit(torch.randn(16, 6), torch.randn(16, 6))
    print("final", sum(p.double().sum().item() for p in net.parameters()))
