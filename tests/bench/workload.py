"""A real training step of a chosen length: a small transformer on the CPU."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

_WIDTH, _BLOCK, _CLASSES, _LR = 128, 64, 256, 1e-3


class Workload:
    """Forward, backward and SGD on the same seeded batch; `batch` sets how long it takes."""

    def __init__(self, batch: int, threads: int = 2) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(_WIDTH, 4, 4 * _WIDTH, batch_first=True)
        body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        head = nn.Linear(_WIDTH, _CLASSES)
        self.model = nn.Sequential(nn.Embedding(_CLASSES, _WIDTH), body, head)
        self.ids = torch.randint(_CLASSES, (batch, _BLOCK))

    def step(self) -> Tensor:
        """One optimizer step; its loss still hangs on its graph, as in anyone's loop."""
        self.model.zero_grad(set_to_none=True)
        logits = self.model(self.ids)
        loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), self.ids.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():  # SGD in place: importing torch.optim takes a second or two
            for parameter in self.model.parameters():
                parameter.sub_(parameter.grad, alpha=_LR)  # type: ignore[arg-type]
        return loss


def milliseconds(batch: int, steps: int = 15) -> float:
    """Median length of a step after a third of them as warm-up."""
    work, lengths = Workload(batch), []
    for _ in range(steps):
        begin = time.perf_counter()
        work.step()
        lengths.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(lengths[steps // 3 :])


def batch_for(target_ms: float) -> int:
    """The batch whose step takes about `target_ms` on this machine, found in two tries."""
    batch = 8
    for _ in range(2):
        batch = max(1, round(batch * target_ms / milliseconds(batch)))
    return batch
