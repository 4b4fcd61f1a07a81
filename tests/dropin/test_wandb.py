"""W&B beside the journal: offline for real, and quiet where it is absent or breaks."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import records

import observability as obs


def test_an_offline_run_reaches_wandb(open_run, run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    open_run(config={"lr": 0.1})
    for step in range(1, 21):
        obs.step(step, loss=1 / step)
    obs.validation(0.5)
    obs.finish()
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before  # its start draws nothing from the training's generators
    [file] = run_dir.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()  # a log of protobuf records, not compressed
    assert content.count(b"loss/train") >= 20
    assert b"loss/val_step" in content
    assert len(records(run_dir, "train")) == 20


def test_an_absent_wandb_is_said_once_and_nothing_else_changes(
    open_run, run_dir, monkeypatch, capfd
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    open_run(wandb=True)
    for step in range(1, 4):
        obs.step(step, loss=1.0)
    obs.finish()
    assert capfd.readouterr().err.count("W&B is off") == 1
    assert len(records(run_dir, "train")) == 3


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_wandb_that_breaks_is_dropped(open_run, run_dir, monkeypatch, tmp_path, capfd, when):
    """A package of that name that raises, as a client does without its service."""
    calls = {
        name: "raise ConnectionError('no service')" if name == when else "pass"
        for name in ("log", "finish")
    }
    start = "raise ConnectionError('no service')" if when == "init" else "return Client()"
    (tmp_path / "wandb.py").write_text(
        "class Client:\n def define_metric(self, *a, **k): pass\n"
        f" def log(self, *a, **k): {calls['log']}\n"
        f" def finish(self): {calls['finish']}\ndef init(**k): {start}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    open_run(wandb=True)
    obs.step(1, loss=1.0)
    obs.finish()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert len(records(run_dir, "train")) == 1
    assert (run_dir / "results.json").exists()
    assert capfd.readouterr().err.count("is off") == 1


def test_without_wandb_no_process_is_started(open_run):
    def children() -> list[str]:
        done = subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True
        )
        return [line for line in done.stdout.splitlines() if not line.endswith(" ps")]

    before = children()
    open_run()
    obs.step(1, loss=1.0)
    assert children() == before


def test_a_resume_says_that_its_wandb_curve_holds_points_twice(
    open_run, monkeypatch, tmp_path, tiny_model, capfd
):
    (tmp_path / "wandb.py").write_text(
        "class Client:\n def define_metric(self, *a, **k): pass\n"
        " def log(self, *a, **k): pass\n def finish(self): pass\n"
        "asked = []\ndef init(**k): asked.append(k); return Client()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for ending in ("failed: here", "completed"):
        run = open_run(wandb=True, save_interval=1, resume="auto")
        obs.watch(tiny_model[0], optimizer=tiny_model[1])
        obs.resume(step=0)
        for step in (1, 2):
            obs.step(step, loss=1.0)
            run.settle()
        assert ("W&B takes no point back" in capfd.readouterr().err) == (ending == "completed")
        obs.finish(ending)
    first, second = sys.modules.pop("wandb").asked
    assert first["id"] == second["id"]  # it is one run there, too
