"""A save, a signal and a best evaluation in every place of a loop."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_json
from faults.scripts import Ended, Script, origin

import observability as obs

LOOP = """
import os, signal, torch
from torch.utils.data import DataLoader, Dataset
import observability as obs


class Noisy(Dataset):  # each item draws, as an augmentation does
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return x[index] + 0.1 * torch.rand(4), y[index]


torch.manual_seed(1)
x, y = torch.randn(20, 4), torch.randn(20, 1)
data = Noisy()
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
loader = DataLoader(data, 4, shuffle=True)
run = obs.init("run")
obs.watch(model, optimizer=opt)
step = 0
step = obs.resume(step=step)
print("from", step)
began = step


def evaluate():
    xb, yb = next(iter(loader))
    with torch.no_grad():
        return (model(xb) - yb).square().mean()


def at(place):
    if os.environ.get("AT") == f"{place} {step}":
        obs.save() if os.environ["DO"] == "save" else os.kill(os.getpid(), signal.SIGTERM)


for epoch in range(1, 4):
    at("epoch")
    if obs.skip_epoch(epoch): continue
    for xb, yb in loader:
        at("batch")
        if obs.skip_batch(): continue
        at("begun")
        loss = (model(xb) - yb).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        at("moved")
        step += 1
        if step % 2 == 0:
            at("evaluation")
            obs.validation(evaluate())
            at("evaluated")
        print("loss", step, loss.item().hex())
        obs.step(step, loss=loss, batch=xb)
        at("stepped")
        if str(step) == os.environ.get("KILL_AT"):
            run.settle()
            os.kill(os.getpid(), 9)
    at("tail")
    obs.validation(evaluate())
    at("end")
    torch.rand(epoch)
obs.finish()
"""
# A run that is resumed behind an epoch's last batch has no loss to read.
READS_BEHIND = LOOP.replace('at("tail")', 'at("tail"), print("last", loss.item())')
PLACES = ["epoch", "batch", "begun", "moved", "evaluation", "evaluated", "stepped", "tail", "end"]
SETTINGS = {"SAVE_INTERVAL": 1000, "OBS_RESUME": "auto", "OBS_SAVE_BEST": 0}


def record(script: Script) -> list[Any]:
    """The journal, without what a clock has measured."""
    return [
        (r["step"], r["tags"].get("epoch"), name, value)
        for r in obs.read_run(script.out / "run")
        for name, value in r["metrics"].items()
        if not name.startswith(("speed/", "system/"))
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, list[Any]]:
    script = Script(tmp_path_factory.mktemp("straight"), LOOP)
    return script.run(**SETTINGS), record(script)


@pytest.mark.parametrize("loop", [LOOP, READS_BEHIND], ids=["", "behind"])
@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("place", PLACES)
def test_a_save_that_is_asked_for_anywhere_is_one_to_go_on_from_exactly(
    tmp_path, straight, place, step, loop
):
    script = Script(tmp_path / "work", loop)
    killed = script.killed(**SETTINGS, AT=f"{place} {step}", DO="save", KILL_AT=8)
    is_place = (
        step % 5 == 0 if place in ("epoch", "tail", "end") else step != 5 or "eval" not in place
    )
    saved = sorted(path.name for path in script.out.glob("run/checkpoints/step_*"))
    assert len(saved) == is_place
    ended = script.run(**SETTINGS)
    losses = dict(line.split() for line in straight[0].lines("loss"))
    for line in killed.lines("loss") + ended.lines("loss"):
        assert losses[line.split()[0]] == line.split()[1], line
    if is_place:
        assert 4 <= int(origin(ended)) <= 7
        assert record(script) == straight[1]
        assert "not be exact" not in killed.said + ended.said


@pytest.mark.parametrize("loop", [LOOP, READS_BEHIND], ids=["", "behind"])
@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_loses_no_step_and_makes_none_twice(
    tmp_path, straight, place, step, loop
):
    script = Script(tmp_path / "work", loop)
    stopped = script.run(None, **SETTINGS, AT=f"{place} {step}", DO="stop")
    if stopped.code:
        assert stopped.code == -signal.SIGTERM
        ended = script.run(**SETTINGS)
        assert stopped.lines("loss") + ended.lines("loss") == straight[0].lines("loss")
        assert int(stopped.lines("loss")[-1].split()[0]) in (step, step + 1)
        assert "bit for bit" not in stopped.said + ended.said
    assert record(script) == straight[1]


ACCUMULATED = """
import time, torch
import observability as obs
from torch.utils.data import DataLoader, TensorDataset


class Places:
    def saving(self, step):
        print("saving", step, batches)


torch.manual_seed(1)
x, y = torch.randn(480, 4), torch.randn(480, 1)
model = torch.nn.Linear(4, 1)
model.register_buffer("large", torch.zeros(2_000_000))  # is written while steps go by
opt = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
obs.init("run").add_listener(Places())
obs.watch(model, optimizer=opt)
for epoch in range(2):
    if obs.skip_epoch(epoch): continue
    batches = 0
    for xb, yb in loader:
        if obs.skip_batch(): continue
        loss = (model(xb) - yb).square().mean() / 3
        loss.backward()
        batches += 1
        time.sleep(0.003)
        if batches % 3 == 0:
            opt.step()
            opt.zero_grad()
            obs.step(loss=loss.detach() * 3)
    print("last", loss.item())
obs.finish()
"""


def test_no_save_is_made_between_the_batches_of_an_accumulated_step(tmp_path):
    ended = Script(tmp_path / "work", ACCUMULATED).run(SAVE_INTERVAL=1)
    made = [tuple(map(int, line.split())) for line in ended.lines("saving")]
    assert len(made) > 3
    assert [batches for step, batches in made] == [3 * ((step - 1) % 40 + 1) for step, _ in made]


# --- The best -------------------------------------------------------------------------------------

BEST = """
import os, torch
import observability as obs
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(1)
x, y = torch.randn(20, 4), torch.randn(20, 1)
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.2)
loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
run = obs.init("run")
obs.watch(model, optimizer=opt)
step = 0
step = obs.resume(step=step)


def evaluate():
    with torch.no_grad():
        loss = (model(x) - y).square().mean()
    print("evaluated", step, loss.item().hex())
    return loss


def train(xb, yb):
    if step == 11:
        opt.param_groups[0]["lr"] = -0.1  # from here on it gets worse
    loss = (model(xb) - yb).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


def done(loss):
    run.settle()  # or what is due would be skipped: no step takes as long as a save
    obs.step(step, loss=loss, carry={"step": step})
    run.settle()
    if str(step) == os.environ.get("KILL_AT"):
        run.settle()
        os.kill(os.getpid(), 9)


LOOP
obs.finish()
"""
LOOPS = {
    "before step": """
        for epoch in range(4):
            if obs.skip_epoch(epoch): continue
            for xb, yb in loader:
                if obs.skip_batch(): continue
                loss = train(xb, yb)
                step += 1
                if step % 3 == 0: obs.validation(evaluate())
                done(loss)
    """,
    "after step": """
        for epoch in range(4):
            if obs.skip_epoch(epoch): continue
            for xb, yb in loader:
                if obs.skip_batch(): continue
                loss = train(xb, yb)
                step += 1
                done(loss)
                if step % 3 == 0: obs.validation(evaluate())
    """,
    "at the top of an iteration": """
        for epoch in range(4):
            if obs.skip_epoch(epoch): continue
            for xb, yb in loader:
                if obs.skip_batch(): continue
                if step % 3 == 0: obs.validation(evaluate())
                loss = train(xb, yb)
                step += 1
                done(loss)
    """,
    "behind an epoch": """
        for epoch in range(4):
            if obs.skip_epoch(epoch): continue
            for xb, yb in loader:
                if obs.skip_batch(): continue
                loss = train(xb, yb)
                step += 1
                done(loss)
            obs.validation(evaluate())
    """,
    "at the beginning of an epoch": """
        for epoch in range(4):
            if obs.skip_epoch(epoch): continue
            if not run.is_passing(): obs.validation(evaluate())
            for xb, yb in loader:
                if obs.skip_batch(): continue
                loss = train(xb, yb)
                step += 1
                done(loss)
    """,
    "in a loop without skip lines, at its top": """
        while True:
            if step % 3 == 0: obs.validation(evaluate())
            if step == 20: break
            loss = train(x[step % 5 :: 5], y[step % 5 :: 5])
            step += 1
            done(loss)
    """,
    "in a loop without skip lines, at its end": """
        while step < 20:
            loss = train(x[step % 5 :: 5], y[step % 5 :: 5])
            step += 1
            if step % 3 == 0: obs.validation(evaluate())
            done(loss)
    """,
    "by hand, without an optimizer": """
        while step < 20:
            if step % 3 == 0: obs.validation(evaluate())
            (model(x[step % 5 :: 5]) - y[step % 5 :: 5]).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= (0.2 if step < 11 else -0.1) * p.grad
                    p.grad = None
            step += 1
            done(1.0)
    """,
}


def best_script(folder: Path, loop: str) -> Script:
    return Script(folder, BEST.replace("LOOP\n", textwrap.dedent(LOOPS[loop])))


def loss_of(path: Path) -> str:
    """What evaluate() of the scripts gives for the weights in a checkpoint."""
    torch.manual_seed(1)
    x, y = torch.randn(20, 4), torch.randn(20, 1)
    model = torch.nn.Linear(4, 1)
    model.load_state_dict(torch.load(path / "model.pth"))
    with torch.no_grad():
        return (model(x) - y).square().mean().item().hex()


def best_evaluation(*ended: Ended) -> tuple[int, str]:
    """The step and the loss, of those after the first step."""
    lines = [line.split() for each in ended for line in each.lines("evaluated")]
    evaluations = {int(step): loss for step, loss in lines if step != "0"}
    step = min(evaluations, key=lambda step: float.fromhex(evaluations[step]))
    return step, evaluations[step]


@pytest.mark.parametrize("interval", [1000, 4, 3, 1])
@pytest.mark.parametrize("loop", LOOPS)
def test_best_names_weights_that_were_evaluated_with_just_that_loss(tmp_path, loop, interval):
    script = best_script(tmp_path / "work", loop)
    ended = script.run(SAVE_INTERVAL=interval, KEEP_LAST=1)
    step, loss = best_evaluation(ended)
    results = read_json(script.out / "run/results.json")
    assert results["best_val_step"] == step
    assert results["best_val_loss"].hex() == loss
    link = script.out / "run/checkpoints/best"
    if "by hand" in loop and interval < 4:  # step_… is there, and nothing tells that it is these
        assert not link.is_symlink()
        return
    assert results["best_checkpoint"] == f"checkpoints/{os.readlink(link)}"
    assert loss_of(link) == loss
    assert obs.is_valid_ckpt(link)
    kept = [*script.out.glob("run/checkpoints/step_*")]
    assert len(kept) <= 2
    assert "exact" not in ended.said


@pytest.mark.parametrize("kill_at", [7, 10, 13, 16])
@pytest.mark.parametrize("loop", LOOPS)
def test_best_outlives_a_kill_and_gives_way_to_what_is_better(tmp_path, loop, kill_at):
    settings = {"SAVE_INTERVAL": 4, "KEEP_LAST": 1, "OBS_RESUME": "auto"}
    straight = best_script(tmp_path / "straight", loop)
    expected = best_evaluation(straight.run(**settings))
    script = best_script(tmp_path / "work", loop)
    killed = script.killed(**settings, KILL_AT=kill_at)
    link = script.out / "run/checkpoints/best"
    if link.exists():
        assert loss_of(link) in killed.said
    ended = script.run(**settings)
    assert best_evaluation(killed, ended) == expected
    assert loss_of(link) == expected[1]
    assert read_json(script.out / "run/results.json")["best_val_step"] == expected[0]
    assert "bit for bit" not in ended.said
    assert "was saved with this said" not in ended.said  # nothing goes on from what is inexact


def test_to_go_on_from_the_best_weights_of_an_iteration_says_what_it_repeats(tmp_path):
    script = best_script(tmp_path / "work", "at the top of an iteration")
    script.run(SAVE_INTERVAL=1000)
    step = os.readlink(script.out / "run/checkpoints/best")
    ended = script.run(SAVE_INTERVAL=1000, OBS_RESUME=f"out/run/checkpoints/{step}")
    assert f"{step} was saved with this said: it was made at an evaluation" in ended.said


def test_without_the_wish_no_best_is_kept(tmp_path):
    script = best_script(tmp_path / "work", "before step")
    script.run(SAVE_INTERVAL=1000, OBS_SAVE_BEST=0)
    assert not (script.out / "run/checkpoints/best").is_symlink()
    assert "best_checkpoint" not in read_json(script.out / "run/results.json")


# --- A save that was not to be expected -----------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5, 7])
@pytest.mark.parametrize("place", ["begun", "stepped", "tail", "epoch"])
def test_a_save_where_none_was_set_is_one_to_go_on_from_exactly_too(
    tmp_path, straight, place, step
):
    """At the end of the epoch, for how this one began nobody has noted."""
    script = Script(tmp_path / "work", LOOP)
    asked = {"AT": f"{place} {step}", "DO": "save", "KILL_AT": 13}
    killed = script.killed(**asked)
    ended = script.run(**SETTINGS)
    if step == 5 or place in ("begun", "stepped"):
        in_first = step < 5 or (step == 5 and place != "begun")
        assert origin(ended) == ("5" if in_first else "10")
        assert record(script) == straight[1]
    else:
        assert origin(ended) == "0"
    losses = dict(line.split() for line in straight[0].lines("loss"))
    for line in killed.lines("loss") + ended.lines("loss"):
        assert losses[line.split()[0]] == line.split()[1], line
    assert "not be exact" not in killed.said
