"""Objects of scripts' own, for the table of edits."""
import copy
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Sampler


class Net(nn.Module):
    """`anew` sums from zero in each forward; `scale` is the script's to set."""

    def __init__(self):
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)
        self.scale, self.anew = 0.5, 0.0
        self.register_buffer("rope", torch.arange(4.0), persistent=False)

    def forward(self, x):
        self.anew = 0.0
        self.anew += x.mean().item()
        return self.two(self.drop(torch.tanh(self.one(x + self.rope)))) * self.scale


class Counts(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x / self.calls)


class Remembers(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    def forward(self, x):
        self.seen = 0.9 * self.seen + 0.1 * x.mean(0).detach()
        return super().forward(x + self.seen)


class Noisy(Dataset):
    """Each item is drawn from all three generators, as augmentations are."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, at):
        x, y = self.data[at]
        return x + torch.randn(4) * random.random() + np.random.rand(), y


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        for x, y in self.data:
            yield x + torch.randn(4), y


class Shuffled(Sampler):
    """By a generator of numpy or of Python."""

    def __init__(self, rng):
        self.rng = rng

    def __len__(self):
        return 20

    def __iter__(self):
        order = list(range(20))
        self.rng.shuffle(order)
        return iter(order)


class Counting(Sampler):
    """By the number of the epoch, which it counts itself."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 20

    def __iter__(self):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += 1
        return iter(order.tolist())


class Stateful:
    """A loader that comes back to its place by itself."""

    def __init__(self, data):
        self.data, self.rng, self.order, self.at = data, random.Random(5), [], 0

    def __len__(self):
        return 5

    def __iter__(self):
        if not self.order:
            self.order = self.rng.sample(range(20), 20)
        while self.at < 20:
            self.at += 4
            yield self.data[self.order[self.at - 4 : self.at]]
        self.order, self.at = [], 0

    def state_dict(self):
        return {"rng": self.rng.getstate(), "order": self.order, "at": self.at}

    def load_state_dict(self, state):
        version, words, gauss = state["rng"]
        self.rng.setstate((version, tuple(words), gauss))
        self.order, self.at = state["order"], state["at"]


class Windows:
    """Batches one after the other from a place that it keeps, as small language models have it."""

    def __init__(self, data):
        self.data = data
        self.reset()

    def reset(self):
        self.position = 0

    def next_batch(self):
        batch = self.data[self.position : self.position + 3]
        self.position += 3
        if self.position + 3 > 20:
            self.position = 0
        return batch


class Average:
    """Of the weights, in a model of its own."""

    def __init__(self, model):
        self.shadow = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model):
        for mine, its in zip(self.shadow.parameters(), model.parameters()):
            mine.data.mul_(0.9).add_(its.data, alpha=0.1)


class Shadows:
    """Of the weights, in a dict."""

    def __init__(self, model):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, model):
        for name, p in model.named_parameters():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * p.detach()


class SAM(torch.optim.Optimizer):
    """Steps up, and then down by an optimizer of its own."""

    def __init__(self, params, base, **settings):
        super().__init__(params, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def ascend(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def descend(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data = self.state[p]["old"]
        self.base_optimizer.step()


class Noam:
    """Sets the rate, and steps."""

    def __init__(self, optimizer):
        self.optimizer, self.made = optimizer, 0

    def step(self):
        self.made += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.05 * min(self.made**-0.5, self.made / 8)
        self.optimizer.step()


class Odd:
    """Answers no question, or each."""

    def __init__(self, answers):
        self.answers = answers

    def __getattr__(self, name):
        if not self.__dict__.get("answers"):
            raise RuntimeError(name)
        return lambda *_: self

    def get_state(self):
        raise RuntimeError("this is no generator")

    def state_dict(self):
        raise RuntimeError("nor has it a state")

    load_state_dict = __iter__ = __len__ = state_dict


class Meter:
    """Is stepped and called, and nothing depends on it."""

    def __init__(self):
        self.count, self.total = 0, 0.0

    def step(self):
        self.count += 1

    def __call__(self, value):
        self.total += value


class EarlyStopping:
    """Counts the evaluations that bring nothing."""

    def __init__(self):
        self.best, self.counter, self.stops = 1e9, 0, False

    def __call__(self, loss):
        self.counter += 1
        if loss < self.best - 1:
            self.best, self.counter = loss, 0
        self.stops = self.counter > 99


def hidden(thing):
    """Its step(), where no name leads to it."""
    return lambda: thing.step()
