"""A save, a signal and a best evaluation in every place of a loop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_json
from faults.scripts import Ended, Script, origin

import observability as obs

LOOP = """
import os, signal, torch
from torch.utils.data import DataLoader, TensorDataset
import observability as obs

torch.manual_seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))
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
    x, y = next(iter(loader))  # it draws, as dropout does
    with torch.no_grad():
        return (model(x) - y).square().mean()


def at(place):
    if os.environ.get("AT") == f"{place} {step}":
        obs.save() if os.environ["DO"] == "save" else os.kill(os.getpid(), signal.SIGTERM)


for epoch in range(1, 4):
    at("epoch")
    if obs.skip_epoch(epoch): continue
    for x, y in loader:
        at("batch")
        if obs.skip_batch(): continue
        at("begun")
        loss = (model(x) - y).square().mean()
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
        obs.step(step, loss=loss, batch=x)
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
PLACES = "epoch batch begun moved evaluation evaluated stepped tail end".split()
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


@pytest.mark.parametrize("step", [4, 5, 6])
@pytest.mark.parametrize("place", PLACES)
def test_a_save_that_is_asked_for_anywhere_is_one_to_go_on_from_exactly(
    tmp_path, straight, place, step
):
    script = Script(tmp_path / "work", LOOP)
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


@pytest.mark.parametrize("step", [4, 5, 6])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_loses_no_step_and_makes_none_twice(tmp_path, straight, place, step):
    script = Script(tmp_path / "work", LOOP)
    stopped = script.run(None, **SETTINGS, AT=f"{place} {step}", DO="stop")
    if stopped.code:
        assert stopped.code == -signal.SIGTERM
        ended = script.run(**SETTINGS)
        assert stopped.lines("loss") + ended.lines("loss") == straight[0].lines("loss")
        assert int(stopped.lines("loss")[-1].split()[0]) in (step, step + 1)
        assert "bit for bit" not in stopped.said + ended.said
    assert record(script) == straight[1]
