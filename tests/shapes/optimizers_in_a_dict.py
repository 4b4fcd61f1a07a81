"""Optimizers in a dict, and lists of losses that are filled through zip and by a function."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def note_down(seen, value):
    seen.append(round(value, 4))


torch.manual_seed(42)
coder, critic = nn.Linear(4, 2), nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 1))
opts = {
    "coder": torch.optim.Adam(coder.parameters(), lr=0.01),
    "critic": torch.optim.SGD(critic.parameters(), lr=0.1, momentum=0.9),
}
loader = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=8, shuffle=True)
histories, sums = [[], []], []
for epoch in range(3):
    for (x,) in loader:
        loss = critic(coder(x)).square().mean()
        for each in opts.values():
            each.zero_grad()
        loss.backward()
        opts["coder"].step()
        opts["critic"].step()
        for net, history in zip((coder, critic), histories):
            history.append(sum(p.sum().item() for p in net.parameters()))
        note_down(sums, loss.item())
print("final", histories, sums)
