"""Methods of an object of this file that read it and change nothing."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Diffusion:
    def __init__(self, noise_steps=10):
        self.noise_steps = noise_steps
        self.alpha_hat = torch.linspace(0.99, 0.01, noise_steps)

    def noise_images(self, x, t):
        keep = self.alpha_hat[t][:, None]
        noise = torch.randn_like(x)
        return keep.sqrt() * x + (1 - keep).sqrt() * noise, noise

    def sample_timesteps(self, n):
        return torch.randint(low=1, high=self.noise_steps, size=(n,))


def train():
    torch.manual_seed(42)
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    dataloader = DataLoader(data, batch_size=8, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mse = nn.MSELoss()
    diffusion = Diffusion()
    for epoch in range(3):
        for i, (images, _) in enumerate(dataloader):
            t = diffusion.sample_timesteps(images.shape[0])
            x_t, noise = diffusion.noise_images(images, t)
            loss = mse(noise, model(x_t))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print("train", epoch * len(dataloader) + i + 1, loss.item())
    print("final", sum(p.double().sum().item() for p in model.parameters()))


if __name__ == "__main__":
    train()
