"""A recurrent model: the hidden state is carried over batches, the update is written by hand."""
import math

import torch
from torch import nn

torch.manual_seed(25)
rnn, head = nn.RNN(6, 8), nn.Linear(8, 6)
model = nn.ModuleList([rnn, head])
corpus = torch.randint(6, (70, 2))
criterion = nn.CrossEntropyLoss()
bptt, lr = 7, 0.5


def get_batch(source, i):
    return nn.functional.one_hot(source[i:i + bptt], 6).float(), source[i + 1:i + 1 + bptt].view(-1)


def repackage_hidden(h):
    return h.detach()


def evaluate(source):
    model.eval()
    total_loss, hidden = 0., torch.zeros(1, 2, 8)
    with torch.no_grad():
        for i in range(0, source.size(0) - bptt - 1, bptt):
            data, targets = get_batch(source, i)
            output, hidden = rnn(data, hidden)
            total_loss += criterion(head(output).view(-1, 6), targets).item()
    return total_loss / 9


def train():
    model.train()
    total_loss = 0.
    hidden = torch.zeros(1, 2, 8)
    for batch, i in enumerate(range(0, corpus.size(0) - bptt - 1, bptt)):
        data, targets = get_batch(corpus, i)
        hidden = repackage_hidden(hidden)
        model.zero_grad()
        output, hidden = rnn(data, hidden)
        loss = criterion(head(output).view(-1, 6), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-lr)
        total_loss += loss.item()
        if batch % 4 == 0 and batch > 0:
            print('batch {:3d} loss {:5.2f}'.format(batch, total_loss / 4))
            total_loss = 0


best_val_loss = None
try:
    for epoch in range(1, 4):
        train()
        val_loss = evaluate(corpus)
        print('epoch', epoch, val_loss, math.exp(val_loss))
        if not best_val_loss or val_loss < best_val_loss:
            best_val_loss = val_loss
        else:
            lr /= 4.0
except KeyboardInterrupt:
    print('Exiting early')
print("final", sum(p.double().sum().item() for p in model.parameters()))
