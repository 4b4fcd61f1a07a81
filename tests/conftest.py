"""What the tests share: a fresh run in a temporary folder, and child processes of this Python."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: several tests run at a time, and threads that wait for each other on
# the same cores take many times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import observability as obs

ROOT = Path(__file__).resolve().parents[1]
MAINRUN = ROOT / "mainrun"
os.environ["OBS_PLOT_INTERVAL"] = "0"  # a process that draws, for each of hundreds of runs


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "OBS_DISABLE", "RANK", "PRESET", "TITLES", "GIT_SHA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(obs, "_said", set())  # what is said once, is said in each test


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[Callable[..., obs.Run]]:
    """`init` with its folders under tmp_path; what is still open at the end is closed."""

    def init(name: str | None = "run", **settings: Any) -> obs.Run:
        settings.setdefault("system_interval", 0)
        return obs.init(name, out_dir=tmp_path / "out", tb_dir=tmp_path / "tb", **settings)

    yield init
    obs.finish()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "out" / "run"


@pytest.fixture
def tiny_model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def records(run_dir: Path, phase: str) -> list[dict[str, Any]]:
    return [r for r in obs.read_run(run_dir) if r["tags"]["phase"] == phase]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def python(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """This Python with the arguments, its output captured."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def forks() -> Any:
    """A context whose processes fork from one that has torch already: they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "observability", "train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    return context
