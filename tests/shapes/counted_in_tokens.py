"""Progress counted in tokens and from 1; a `while` around the loader; one-line `if`s."""
import torch
from torch import nn

torch.manual_seed(22)
model = nn.Sequential(nn.Embedding(16, 8), nn.Dropout(0.1), nn.Linear(8, 16))
opt = torch.optim.AdamW(model.parameters(), lr=0.01)
data = torch.randint(16, (24, 9))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4, shuffle=True)
tokens_seen, max_tokens, done = 0, 500, False
n_batches = 1
while not done:
    for (batch,) in loader:
        x, y = batch[:, :-1], batch[:, 1:]
        if n_batches == 4: n_batches += 1; continue
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        opt.zero_grad(); loss.backward(); opt.step()
        tokens_seen += y.numel()
        n_batches += 1
        if tokens_seen >= max_tokens: done = True; break
    print(n_batches, tokens_seen, loss.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
