"""A script as it is: what is recorded of one that has no call sites."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import MAINRUN, python

import observability as obs

PLAIN = """
import os, sys
assert "torch" not in sys.modules
os.environ["OMP_NUM_THREADS"] = "1"
import torch
torch.manual_seed(0)
assert __name__ == "__main__" and sys.path[0] == os.path.dirname(os.path.abspath(__file__))
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
for step in range(6):
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    print(loss.item(), norm.item())
print(sys.argv[1:], torch.rand(1).item())
"""

SCALED = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
for step in range(3):
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    print(loss.item())
"""

ACCUMULATED = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    total = 0
    for micro in range(2):
        loss = model(torch.randn(8, 4)).square().mean() / 2
        loss.backward()
        total = loss.detach() + total
    optimizer.step()
    optimizer.zero_grad()
    print(total.item())
"""

CLOSURE = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
x = torch.randn(8, 4)
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
losses = []
def closure():
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    losses.append(loss.item())
    return loss
for step in range(3):
    optimizer.step(closure)
    print(losses[-1])
"""

ADVERSARIES = """
import torch
torch.manual_seed(0)
models = [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)]
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
for step in range(3):
    for model, optimizer in zip(models, optimizers):
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item())
"""

WITHIN_BACKWARD = """
import torch
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(4))
optimizer = torch.optim.SGD([weight], lr=0.1)
def update(parameter):
    optimizer.step()
    optimizer.zero_grad()
weight.register_post_accumulate_grad_hook(update)
for step in range(3):
    loss = (torch.randn(8, 4) @ weight).square().mean()
    loss.backward()
    print(loss.item())
"""


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(script)
    return python(MAINRUN / "observability.py", "run", folder / "train.py", *arguments)


def metrics(folder: Path) -> list[dict[str, Any]]:
    [run_dir] = (folder / "out").iterdir()
    found = [record["metrics"] for record in obs.read_run(run_dir)]
    return [each for each in found if any(name.startswith("loss") for name in each)]


def test_an_untouched_script_is_recorded_and_computes_the_same(tmp_path):
    observed = run(tmp_path, PLAIN, "--lr", "3")
    assert observed.returncode == 0, observed.stderr
    alone = python(tmp_path / "train.py", "--lr", "3")
    assert observed.stdout == alone.stdout
    assert "6 steps are in" in observed.stderr
    lines = [[float(word) for word in line.split()] for line in alone.stdout.splitlines()[:-1]]
    seen = metrics(tmp_path)
    assert [each["loss/train"] for each in seen] == [loss for loss, _ in lines]
    assert [each["lr"] for each in seen] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    assert [each["grad_norm"] for each in seen[:3]] == pytest.approx([n for _, n in lines[:3]])
    assert "speed/step_s" not in seen[0]  # what came before it is not known
    assert all(each["speed/step_s"] > 0 for each in seen[1:])
    [run_dir] = (tmp_path / "out").iterdir()
    manifest = json.loads((run_dir / "run_manifest.json").read_text())
    assert manifest["script"] == "train.py"
    assert manifest["command_line"][1:] == ["--lr", "3"]
    results = json.loads((run_dir / "results.json").read_text())
    assert (results["status"], results["steps"]) == ("completed", 6)


@pytest.mark.parametrize(
    "script",
    [SCALED, ACCUMULATED, CLOSURE, WITHIN_BACKWARD],
    ids=["scaled", "accumulated", "closure", "within backward"],
)
def test_the_loss_is_that_of_the_step_however_it_is_made(tmp_path, script):
    done = run(tmp_path, script)
    seen = [each["loss/train"] for each in metrics(tmp_path)]
    assert seen == [float(line) for line in done.stdout.splitlines()]


def test_each_of_several_optimizers_has_a_curve_of_its_own(tmp_path):
    done = run(tmp_path, ADVERSARIES)
    losses = [float(line) for line in done.stdout.splitlines()]
    seen = metrics(tmp_path)
    assert [each["loss/train"] for each in seen[::2]] == losses[::2]
    assert [each["loss/train/1"] for each in seen[1::2]] == losses[1::2]


@pytest.mark.parametrize(
    ("end", "code", "status"),
    [
        ("raise RuntimeError('out of luck')", 1, "failed: RuntimeError"),
        ("sys.exit(3)", 3, "failed: SystemExit"),
        ("sys.exit()", 0, "completed"),
        ("open('missing')", 1, "failed: FileNotFoundError"),
    ],
)
def test_a_script_ends_as_it_would_have(tmp_path, end, code, status):
    done = run(tmp_path, PLAIN + end)
    assert done.returncode == code
    assert ("out of luck" in done.stderr) == (status == "failed: RuntimeError")
    [run_dir] = (tmp_path / "out").iterdir()
    assert json.loads((run_dir / "results.json").read_text())["status"] == status


def test_a_script_that_trains_nothing_is_said_to(tmp_path):
    done = run(tmp_path, "print('hello')")
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert "no optimizer has stepped" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_script_that_is_not_there_is_an_error(tmp_path):
    done = python(MAINRUN / "observability.py", "run", tmp_path / "train.py")
    assert done.returncode == 2
    assert "train.py is no file" in done.stderr


def test_a_script_with_call_sites_keeps_its_own_run(tmp_path):
    own = "import observability as obs\nobs.init('own')\n" + PLAIN.replace("assert", "#", 1)
    done = run(tmp_path, own + "obs.step(loss=0.5)")
    assert done.returncode == 0, done.stderr
    assert "it has call sites of its own" in done.stderr
    assert [each["loss/train"] for each in metrics(tmp_path)] == [0.5]


def test_a_script_that_imports_us_finds_the_copy_that_records(tmp_path):
    (tmp_path / "observability.py").write_text("raise ImportError('another copy')")
    done = run(tmp_path, PLAIN + "import observability\nprint(observability.current_run().steps)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "6"


def test_a_script_runs_in_any_folder_and_with_ours_off(tmp_path):
    (tmp_path / "train.py").write_text(PLAIN)
    elsewhere = {"cwd": "/", "env": {**os.environ, "OBS_DISABLE": "1"}}
    done = python(MAINRUN / "observability.py", "run", tmp_path / "train.py", **elsewhere)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
