"""A run that is killed goes on to the same last digit, and its curve is one curve."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAINRUN, read_json
from test_proof import run_scripts, same_bits, unobserved, write_scripts  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import observability as obs

SIZE = 20  # items; five batches


class Noisy(Dataset):
    """Each item is drawn anew from all three generators, as augmentations are."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand(6) + float(np.random.rand()) + random.random()
        return noise * 0.1 + index / SIZE


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(SIZE):
            yield torch.rand(6) + index / SIZE


class OwnState:
    """A loader that comes back to its place by itself."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            yield torch.full((4, 6), self.at / 5)
        self.at = 0

    def __len__(self) -> int:
        return 5

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Script:
    """One training script of the kind named; `step` ends an iteration as a call site does."""

    def __init__(self, kind: str, losses: Path, kill_at: int) -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        self.kind, self.losses, self.kill_at = kind, losses, kill_at
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3),
                                   nn.Tanh(), nn.Linear(8, 1))  # fmt: skip
        half = [*self.model[0].parameters()], [*self.model[4].parameters()]
        if kind == "lbfgs":
            self.optimizers = [torch.optim.LBFGS(self.model.parameters(), max_iter=3)]
        elif kind == "accumulate":  # two optimizers as well
            self.optimizers = [torch.optim.AdamW(half[0]), torch.optim.SGD(half[1], 0.1, 0.9)]
        else:
            self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=0.01)]
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizers[0], 1, 0.7)
        self.scaler = torch.amp.GradScaler("cpu", enabled=kind == "scaler", growth_interval=2)
        workers = {"num_workers": 2} if kind == "workers" else {}
        self.loader: Any = DataLoader(Noisy(), 4, shuffle=True, **workers)
        if kind == "iterable":
            self.loader = DataLoader(Stream(), 4)
        elif kind == "own state":
            self.loader = OwnState()
        obs.watch(self.model, optimizer=self.optimizers, scheduler=self.scheduler,
                  scaler=self.scaler, loader=self.loader)  # fmt: skip

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        target = batch.sum(1, keepdim=True)
        if self.kind == "scaler":
            with torch.autocast("cpu", torch.bfloat16):
                return F.mse_loss(self.model(batch).float(), target)
        return F.mse_loss(self.model(batch), target)

    def update(self, batch: torch.Tensor) -> torch.Tensor:
        if self.kind == "lbfgs":
            return self.optimizers[0].step(lambda: self.backward(batch, clear=True))
        loss = self.backward(batch, clear=True)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss

    def backward(self, batch: torch.Tensor, *, clear: bool) -> torch.Tensor:
        if clear:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        loss = self.forward(batch)
        self.scaler.scale(loss).backward()
        return loss

    def done(self, step: int, loss: torch.Tensor, **carry: Any) -> None:
        with self.losses.open("a") as file:
            file.write(f"{step} {loss.item().hex()}\n")
        obs.step(step, loss=loss, carry={"step": step, **carry})
        if step == self.kill_at:
            obs._run._keeper.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self) -> None:
        loops = {"accumulate": self.accumulate, "while": self.while_true, "full": self.full_batch,
                 "one pass": self.one_pass}  # fmt: skip
        loops.get(self.kind, self.epochs)()

    def epochs(self) -> None:
        step = obs.resume(step=0)
        for epoch in range(3):
            if obs.skip_epoch(epoch):
                continue
            for batch in self.loader:
                if obs.skip_batch():
                    continue
                step += 1
                loss = self.update(batch)
                self.done(step, loss)
            self.scheduler.step()
            torch.rand(epoch + 1)  # the epoch's own tail draws too

    def accumulate(self) -> None:
        step = obs.resume(step=0)
        for epoch in range(3):
            if obs.skip_epoch(epoch):
                continue
            for index, batch in enumerate(self.loader):
                if obs.skip_batch():
                    continue
                loss = self.backward(batch, clear=index % 2 == 0)
                if index % 2 == 1 or index == 4:
                    step += 1
                    for optimizer in self.optimizers:
                        optimizer.step()
                    self.done(step, loss)

    def while_true(self) -> None:
        batch, history = torch.rand(4, 6), {"all": [0.0]}  # the first batch is fetched ahead
        step, batch, history = obs.resume(step=0, batch=batch, history=history)
        while True:
            if step >= 12:
                break
            loss = self.update(batch)
            batch = torch.rand(4, 6)
            history["all"].append(loss.item())
            step += 1
            self.done(step, loss, batch=batch, history=history)
        assert len(history["all"]) == 13

    def full_batch(self) -> None:
        for step in range(1, 8):
            if step == 1:
                obs.resume()
            if obs.skip_epoch(step):
                continue
            loss = self.update(torch.rand(20, 6))
            self.done(step, loss)

    def one_pass(self) -> None:
        step = obs.resume(step=0)
        for batch in self.loader:
            if obs.skip_batch():
                continue
            step += 1
            self.done(step, self.update(batch))


def train(kind: str, folder: Path, kill_at: int = 0, **settings: Any) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    settings = {"save_interval": "1", "system_interval": 0, "resume": "auto", **settings}
    obs.init("run", out_dir=folder / "out", tb_dir=folder / "tb", **settings)
    script = Script(kind, folder / "losses", kill_at)
    script.run()
    obs.finish()
    rng = obs.rng_state()
    states = [optimizer.state_dict() for optimizer in script.optimizers]
    torch.save([script.model.state_dict(), states, rng], folder / "ended")


@pytest.fixture(scope="module")
def process():
    """Start `train` in a fork of a process that has torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])

    def run(*arguments: Any, **settings: Any) -> int:
        started = context.Process(target=train, args=arguments, kwargs=settings)
        started.start()
        started.join(120)
        return started.exitcode

    return run


def losses_of(path: Path) -> dict[int, str]:
    """By step; a step that was done twice came out the same."""
    losses: dict[int, str] = {}
    for line in path.read_text().splitlines():
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"step {step}"
    return losses


def ended(folder: Path) -> Any:
    return torch.load(folder / "ended", weights_only=False)


KINDS = ["plain", "workers", "accumulate", "lbfgs", "scaler", "iterable", "own state", "while",
         "full", "one pass"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_after_every_step_ends_in_the_same_digits(tmp_path, process, kind):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert process(kind, straight) == 0
    expected = losses_of(straight / "losses")
    for kill_at in range(1, max(expected) + 1, 4 if kind == "workers" else 1):  # those are slow
        assert process(kind, killed, kill_at) == -signal.SIGKILL
    assert process(kind, killed) == 0
    assert losses_of(killed / "losses") == expected
    assert same_bits(ended(killed), ended(straight))
    journal = [(r["step"], r["metrics"]["loss/train"]) for r in obs.read_run(killed / "out/run")
               if "loss/train" in r["metrics"]]  # fmt: skip
    assert journal == [(n, float.fromhex(loss)) for n, loss in expected.items()]
    assert obs.verify(killed / "out/run")["damage"] == []
