"""After denoising-diffusion-pytorch, with a loop over its loader."""
import random

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import observability as obs

torch.manual_seed(1), np.random.seed(1), random.seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))

class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        betas = torch.linspace(1e-4, 0.02, 10)
        self.register_buffer("alphas", torch.cumprod(1 - betas, 0), persistent=False)
        self.net, self.num_timesteps, self.self_condition = nn.Linear(5, 4), 10, False
    def forward(self, x):
        t = torch.randint(0, self.num_timesteps, (x.shape[0], 1))
        noise = torch.randn_like(x)
        a = self.alphas[t]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        return (self.net(torch.cat([noisy, t / 10], 1)) - noise).square().mean()
class Trainer:
    def __init__(self, diffusion_model, dataset, train_num_steps=15):
        self.model = diffusion_model
        self.ema = AveragedModel(diffusion_model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.opt = torch.optim.Adam(diffusion_model.parameters(), lr=0.01, betas=(0.9, 0.99))
        self.dl = DataLoader(dataset, batch_size=4, shuffle=True)
        self.step, self.train_num_steps = 0, train_num_steps
    def train(self):
        obs.watch(self.model, self.ema, optimizer=self.opt)
        self.step = obs.resume(step=self.step)
        while self.step < self.train_num_steps:
            if obs.skip_epoch(): continue
            for x, _ in self.dl:
                if obs.skip_batch(): continue
                loss = self.model(x)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.opt.step()
                self.opt.zero_grad()
                self.step += 1
                self.ema.update_parameters(self.model)
                obs.step(self.step, loss=loss, carry={"step": self.step})
obs.init("run")
trainer = Trainer(Diffusion(), data)
trainer.train()
obs.finish()
final(trainer.model, trainer.ema)
