"""An accuracy that is worked out in the loop from held-out data and printed; no loss beside it.

Expected: `accuracy` is recorded under val/ at its step (it has a name where it is printed), or a
note says that an evaluation was seen and not recorded. "none seen" is wrong.
"""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(42)
x = torch.randn(44, 4)
y = (x[:, 0] > 0).long()
test_x, test_y = x[32:], y[32:].numpy()
train_loader = DataLoader(TensorDataset(x[:32], y[:32]), batch_size=8, shuffle=True)
rnn = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.Adam(rnn.parameters(), lr=0.05)
loss_func = nn.CrossEntropyLoss()
for epoch in range(3):
    for step, (b_x, b_y) in enumerate(train_loader):
        loss = loss_func(rnn(b_x), b_y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print("train", epoch * len(train_loader) + step + 1, loss.item())
        if step % 2 == 0:
            test_output = rnn(test_x)
            pred_y = torch.max(test_output, 1)[1].numpy()
            accuracy = float((pred_y == test_y).astype(int).sum()) / float(test_y.size)
            print("Epoch:", epoch, "| test accuracy: %.2f" % accuracy)
print("final", sum(p.double().sum().item() for p in rnn.parameters()))
