"""Of which step a record is that comes without one: the script's own number, in every loop."""

from __future__ import annotations

import textwrap

import pytest
from conftest import records
from scripts import run_script

import observability as obs

HEAD = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Linear(4, 1)

class Plain:
    def step(self):
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    def zero_grad(self):
        model.zero_grad()

class Wrapper:
    def __init__(self, optimizer):
        self._inner = optimizer
    def step(self):
        self._inner.step()
    def zero_grad(self):
        self._inner.zero_grad()

class Sharp(torch.optim.Optimizer):
    def __init__(self, params, base):
        super().__init__(params, {"lr": 0.1})
        self.base_optimizer = base
    def step(self, closure=None):
        self.base_optimizer.step()

class ByHand:
    def step(self):
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-0.1)
    def zero_grad(self):
        model.zero_grad()

def plain_sgd():
    return torch.optim.SGD(model.parameters(), lr=0.1)

def train_step():
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss

def evaluate(step):
    print("val", step)
    with torch.no_grad():
        return model(torch.ones(1, 4)).sum().item()
"""

OPTIMIZERS = {
    "torch's": "optimizer = plain_sgd(); obs.watch(model, optimizer=optimizer)",
    "a plain class": "optimizer = Plain(); obs.watch(model, optimizer=optimizer)",
    "a wrapper": "optimizer = Wrapper(plain_sgd()); obs.watch(model, optimizer=optimizer)",
    "sharpness-aware": "optimizer = Sharp(model.parameters(), plain_sgd()); "
    "obs.watch(model, optimizer=optimizer)",
    "by hand": "optimizer = ByHand(); obs.watch(model)",
    "not watched": "optimizer = ByHand()",
}

LOOPS = {
    "from 0, in mid-iteration": """
        for step in range(5):
            loss = train_step()
            if step % 2 == 0:
                obs.validation(evaluate(step))
            obs.step(step, loss=loss)
    """,
    "from 1, in mid-iteration": """
        for step in range(1, 6):
            loss = train_step()
            if step % 2 == 0:
                obs.validation(evaluate(step))
            obs.step(step, loss=loss)
    """,
    "behind step()": """
        for step in range(1, 6):
            loss = train_step()
            obs.step(step, loss=loss)
            if step % 2 == 0:
                obs.validation(evaluate(step))
    """,
    "with skips": """
        step = 0
        obs.validation(evaluate(step))
        for epoch in range(2):
            if obs.skip_epoch(epoch): continue
            for _ in range(3):
                if obs.skip_batch(): continue
                loss = train_step()
                step += 1
                if step % 2 == 0:
                    obs.validation(evaluate(step))
                    obs.validation(evaluate(step))
                obs.step(step, loss=loss)
            obs.validation(evaluate(step))
        obs.validation(evaluate(step))
    """,
    "before, between and behind": """
        step = 0
        obs.validation(evaluate(step))
        for epoch in range(2):
            for _ in range(3):
                loss = train_step()
                step += 1
                if step % 2 == 0:
                    obs.validation(evaluate(step))
                obs.step(step, loss=loss)
                obs.validation(evaluate(step))
            obs.validation(evaluate(step))
            obs.validation(evaluate(step))
        obs.validation(evaluate(step))
    """,
    "an epoch's function": """
        def train_epoch(step):
            for _ in range(3):
                loss = train_step()
                step += 1
                obs.step(step, loss=loss)
            return step
        def main():
            step = 0
            for epoch in range(2):
                obs.validation(evaluate(step))
                step = train_epoch(step)
                obs.validation(evaluate(step))
        main()
    """,
    "a step's function": """
        class Trainer:
            def fit(self):
                for self.count in range(1, 5):
                    self.do_one()
                    self.check("behind")
            def do_one(self):
                loss = train_step()
                self.check("within")
                obs.step(self.count, loss=loss)
            def check(self, when):
                obs.validation(evaluate(self.count))
        Trainer().fit()
    """,
    "counted in tokens": """
        tokens = 0
        while tokens < 100:
            loss = train_step()
            tokens += 32
            obs.validation(evaluate(tokens))
            obs.step(tokens, loss=loss)
        obs.validation(evaluate(tokens))
    """,
    "two phases": """
        step = 0
        while step < 3:
            loss = train_step()
            step += 1
            obs.validation(evaluate(step))
            obs.step(step, loss=loss)
        for step in range(4, 7):
            loss = train_step()
            obs.validation(evaluate(step))
            obs.step(step, loss=loss)
            obs.validation(evaluate(step))
    """,
    "accumulated": """
        step = 0
        for micro in range(1, 8):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            if micro % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                obs.validation(evaluate(step))
                obs.step(step, loss=loss)
            obs.validation(evaluate(step))
    """,
}


def dates(folder, capsys, setting, loop):
    """Run a script in this process; what it says of its steps, and its run's directory."""
    folder.mkdir(exist_ok=True)
    path = folder / "train.py"
    path.write_text(HEAD + setting + textwrap.dedent(loop) + "\nobs.finish()")
    places = {name: folder / name for name in ("out_dir", "tb_dir")}
    obs.init("run", **places, system_interval=0)
    exec(compile(path.read_text(), path, "exec"), {"obs": obs})
    told = capsys.readouterr()
    assert "failed" not in told.err
    said = [int(row.split()[1]) for row in told.out.splitlines() if row.startswith("val")]
    return said, folder / "out_dir" / "run"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_evaluation_is_of_the_step_that_the_script_says(tmp_path, capsys, optimizer):
    """Whether a hook tells that the optimizer has stepped, or there is none that could."""
    for name, loop in LOOPS.items():
        said, run = dates(tmp_path / name, capsys, OPTIMIZERS[optimizer], loop)
        evaluations = [r for r in records(run, "eval") if "loss/val_step" in r["metrics"]]
        assert [r["step"] for r in evaluations] == said, name


LOGGED = """
    def report(word):
        obs.log({word: 1.0})
    def one():
        loss = train_step()
        print("val", step)
        obs.log({"seen": float(step)})
        return loss
    for step in range({first}, {first} + 4):
        report("before")
        loss = one()
        obs.step(step, loss=loss)
        report("behind")
    print("val", step)
    obs.log({"seen": float(step)})
"""


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("optimizer", ["torch's", "by hand"])
def test_what_is_logged_before_step_is_of_that_step(tmp_path, capsys, optimizer, first):
    loop = LOGGED.replace("{first}", str(first))
    said, run = dates(tmp_path, capsys, OPTIMIZERS[optimizer], loop)
    found = records(run, "train")
    assert [r["step"] for r in found if "seen" in r["metrics"]] == said
    for word in ("before", "behind"):
        assert [r["step"] for r in found if word in r["metrics"]] == [*range(first, first + 4)]


def test_what_is_held_is_as_it_was_when_it_was_recorded(tmp_path, capsys):
    loop = """
        for step in range(2):
            loss, values, total = train_step(), [step], torch.tensor(1.0)
            obs.log({"total": total, "values": values})
            total += 1
            values.append(9)
            obs.step(step, loss=loss)
    """
    _, run = dates(tmp_path, capsys, OPTIMIZERS["torch's"], loop)
    found = [r for r in records(run, "train") if "total" in r["metrics"]]
    assert [(r["metrics"]["total"], r["tags"]["values"]) for r in found] == [(1.0, [0]), (1.0, [1])]


def test_where_no_step_is_made_no_record_waits_for_one(tmp_path):
    loop = """
        import os, signal
        for step in range(5):
            obs.log({"seen": float(step)})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_script(tmp_path, loop)
    found = records(tmp_path / "out" / "run", "train")
    assert [r["metrics"]["seen"] for r in found] == [0.0, 1.0, 2.0, 3.0]
