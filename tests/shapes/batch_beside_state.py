"""A language model whose forward takes a batch and the hidden state; the loop counts positions.

Expected: `batch=inputs` (or none), and not `batch=states`: its size is the number of layers.
"""
import torch
from torch import nn

num_layers, batch_size, seq_length = 1, 4, 5


class RNNLM(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 8)
        self.lstm = nn.LSTM(8, 8, num_layers, batch_first=True)
        self.linear = nn.Linear(8, vocab_size)

    def forward(self, x, h):
        out, (h, c) = self.lstm(self.embed(x), h)
        return self.linear(out.reshape(-1, 8)), (h, c)


def detach(states):
    return [state.detach() for state in states]


torch.manual_seed(42)
ids = torch.randint(11, (batch_size, 31))
model = RNNLM(11)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
done = 0
for epoch in range(2):
    states = (torch.zeros(num_layers, batch_size, 8), torch.zeros(num_layers, batch_size, 8))
    for i in range(0, ids.size(1) - seq_length, seq_length):
        inputs = ids[:, i:i + seq_length]
        targets = ids[:, (i + 1):(i + 1) + seq_length]
        states = detach(states)
        outputs, states = model(inputs, states)
        loss = criterion(outputs, targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        done += 1
        print("train", done, loss.item())
print("final", sum(p.double().sum().item() for p in model.parameters()))
