"""A script as it is: what is recorded of one that has no call sites."""

from __future__ import annotations

import json
import os
import shutil
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
    for micro in range(2):
        loss = model(torch.randn(8, 4)).square().mean() / 2
        loss.backward()
        loss *= 2
        last = loss.item()
        loss *= 2
    optimizer.step()
    optimizer.zero_grad()
    print(last)
"""

# What was left out has no part in the loss of the next step.
OVERFLOWN = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
for step in range(4):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    scaler.scale(loss).backward()
    if step % 2 == 0:
        model.weight.grad.fill_(float("inf"))
    else:
        print(loss.item())
    scaler.step(optimizer)
    scaler.update()
"""

SCALED_AND_ACCUMULATED = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
for step in range(3):
    for micro in range(2):
        loss = model(torch.randn(8, 4)).square().mean()
        if step == 1:  # divided after it was scaled
            (scaler.scale(loss) / 2).backward()
        elif step == 2:  # two losses, each on its way
            for part in scaler.scale([loss / 4, loss / 4]):
                part.backward(retain_graph=True)
        else:
            scaler.scale(loss * 0.5).backward()
    scaler.step(optimizer)
    scaler.update()
    model.zero_grad()
    print(loss.item())
"""

# As accelerate's: its step() is called for each micro-batch and is one for every second.
WRAPPED = """
import sys
import torch
torch.manual_seed(0)
class Wrapper(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer, self.micro = optimizer, 0
        if "hooked" in sys.argv:
            super().__init__(optimizer.param_groups, {})
    def step(self, closure=None):
        self.micro += 1
        if self.micro % 2 == 0:
            self.optimizer.step()
    def zero_grad(self, set_to_none=True):
        if self.micro % 2 == 0:
            self.optimizer.zero_grad()
model = torch.nn.Linear(4, 1)
optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
for batch in range(8):
    loss = model(torch.randn(8, 4)).square().mean() / 2
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if batch % 2:
        print(2 * loss.item())
"""

# As transformers and datasets do; what they find is what there is.
ASKS_FIRST = """
import importlib.util
for _ in range(2):
    spec = importlib.util.find_spec("torch")
print(type(spec.loader).__name__, spec.origin, spec.submodule_search_locations, spec.cached)
has_torch = spec is not None
"""

LIKE_PLAIN = """
import atexit, sys, threading
print(sys.argv, sys.path, __file__, __name__, __package__, __spec__, __doc__, type(__builtins__))
print(type(__loader__).__name__, sys.modules["__main__"].__dict__ is globals())
atexit.register(lambda: print("at exit", sys.modules["__main__"].own))
own = 1
def annotated(x: int): ...
print(annotated.__annotations__)
"""

# Without accumulation a loss is what it is; a step of two divides no other optimizer's.
HALVED = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
other = torch.nn.Linear(4, 1)
theirs = torch.optim.SGD(other.parameters(), lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean() / 2
    loss.backward()
    optimizer.step()
    print(loss.item())
    theirs.zero_grad()
    for _ in range(2):
        other(torch.randn(8, 4)).square().mean().backward()
    theirs.step()
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

# The number of each hook is a key of a dict that is pickled with its module.
PICKLES = """
import hashlib, io, sys, warnings
import torch
from torch.optim import optimizer as of_all
warnings.simplefilter("ignore")
def shown(module, *_):
    pass
def hooked():
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.utils.weight_norm(torch.nn.Linear(4, 8)),
        torch.nn.utils.spectral_norm(torch.nn.Linear(8, 8)),
        torch.nn.Linear(8, 1),
    )
    for register in (net.register_forward_hook, net.register_full_backward_hook):
        register(shown)
    net[2].register_forward_pre_hook(shown)
    return net
model = torch.nn.Linear(4, 1)
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
if "watched" in sys.argv:
    import observability as obs
    obs.init("pickles", save_interval=1)
    obs.watch(model, optimizer=optimizers)
    obs.resume()
for step in range(3):
    for optimizer in optimizers:
        model(torch.ones(8, 4)).square().mean().backward()
        optimizer.step()
    if "watched" in sys.argv:
        obs.step(step + 1)
    file = io.BytesIO()
    torch.save(hooked(), file)
    print(hashlib.sha256(file.getvalue()).hexdigest())
handles = [each.register_step_post_hook(shown) for each in optimizers]
print([handle.id for handle in handles])
if "watched" in sys.argv:
    obs.finish()
    assert all(len(each._optimizer_step_post_hooks) == 1 for each in optimizers)
    assert not of_all._global_optimizer_post_hooks
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


@pytest.mark.parametrize("way", ["untouched", "watched"])
def test_a_module_that_a_script_pickles_has_the_same_bytes(tmp_path, way):
    (tmp_path / "train.py").write_text(PICKLES)
    alone = python(tmp_path / "train.py")
    if way == "untouched":
        observed = run(tmp_path, PICKLES, way)
    else:
        path = {**os.environ, "PYTHONPATH": str(MAINRUN)}
        observed = python(tmp_path / "train.py", way, env=path)
    assert (tmp_path / "out").exists()
    assert alone.returncode == observed.returncode == 0, observed.stderr
    assert observed.stdout == alone.stdout, observed.stderr


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(SCALED, id="scaled"),
        pytest.param(ACCUMULATED, id="accumulated"),
        pytest.param(SCALED_AND_ACCUMULATED, id="scaled and accumulated"),
        pytest.param(OVERFLOWN, id="overflown"),
        pytest.param(HALVED, id="halved"),
        pytest.param(CLOSURE, id="closure"),
        pytest.param(WITHIN_BACKWARD, id="within backward"),
    ],
)
def test_the_loss_is_that_of_the_step_however_it_is_made(tmp_path, script):
    done = run(tmp_path, script)
    seen = [each["loss/train"] for each in metrics(tmp_path) if "loss/train" in each]
    assert seen == [float(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["hooked", "bare"])
def test_a_step_is_one_of_the_optimizer_and_not_of_its_wrapper(tmp_path, kind):
    done = run(tmp_path, WRAPPED, kind)
    seen = metrics(tmp_path)
    assert [each["loss/train"] for each in seen] == [float(row) for row in done.stdout.split()]
    assert [each["lr"] for each in seen] == [0.1] * 4
    assert "4 steps are in" in done.stderr


def test_who_asks_whether_there_is_torch_is_recorded(tmp_path):
    (tmp_path / "asks.py").write_text(ASKS_FIRST)
    observed = run(tmp_path, "import asks\nassert asks.has_torch\n" + PLAIN)
    assert observed.stdout == python(tmp_path / "train.py").stdout
    assert "6 steps are in" in observed.stderr
    assert len(metrics(tmp_path)) == 6


def test_a_torch_that_is_there_already_is_recorded(tmp_path):
    """By a sitecustomize, or by the package that observability.py is run from."""
    site, package = tmp_path / "site", tmp_path / "package"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import torch")
    (tmp_path / "train.py").write_text(PLAIN.replace("assert", "#", 1))
    command = [MAINRUN / "observability.py", "run", "train.py"]
    path = os.pathsep.join([str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = python(*command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert "6 steps are in" in done.stderr

    package.mkdir()
    (package / "__init__.py").write_text("import torch")
    for name in ("observability.py", "observability_tools.py"):
        shutil.copy(MAINRUN / name, package)
    done = python("-m", "package.observability", "run", "train.py", cwd=tmp_path)
    assert "6 steps are in" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (
            "--lr 3e-4 --name=a-1 --fast --shift -1 --api-key 1234567 -n 2",
            {"lr": 3e-4, "name": "a-1", "fast": True, "shift": -1, "api_key": "<redacted>", "n": 2},
        ),
        ("lr=0.1 model=small", {"lr": 0.1, "model": "small"}),
        ("--files a b --token abcd", ["--files", "a", "b", "--token", "<redacted>"]),
        ("--tag a --tag b", ["--tag", "a", "--tag", "b"]),
        ("", {}),
    ],
)
def test_the_arguments_are_the_configuration(tmp_path, arguments, config):
    run(tmp_path, PLAIN, *arguments.split())
    [run_dir] = (tmp_path / "out").iterdir()
    assert json.loads((run_dir / "config.json").read_text())["config"] == config


def test_what_is_not_seen_is_said_once(tmp_path):
    done = run(tmp_path, PLAIN)
    assert done.stderr.count("evaluations are not seen") == 1
    assert "for these patch the script" in done.stderr


BACKWARD_FAILS = """
import torch
def fail(gradient):
    raise RuntimeError("within backward")
def main():
    x = torch.ones(1, requires_grad=True)
    x.register_hook(fail)
    (x * 2).backward()
main()
"""
OWN_HOOK = """
import traceback
sys.excepthook = lambda kind, error, trace: print(traceback.format_tb(trace), file=sys.stderr)
{}["missing"]
"""


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("", id="well"),
        pytest.param("import json\njson.loads('{')", id="in a library"),
        pytest.param(BACKWARD_FAILS, id="below what is hooked"),
        pytest.param("sys.exit('a text')", id="exit"),
        pytest.param("raise KeyboardInterrupt", id="interrupt"),
        pytest.param("def = 1", id="syntax"),
        pytest.param(OWN_HOOK, id="a hook of its own"),
    ],
)
def test_a_script_finds_and_leaves_what_it_does_under_plain_python(tmp_path, end):
    """Its names, its path, its exit status, and every line of its traceback."""
    (tmp_path / "train.py").write_text(LIKE_PLAIN + end)
    arguments = ("./train.py", "--lr", "3", "--", "x")
    observed = python(MAINRUN / "observability.py", "run", *arguments, cwd=tmp_path)
    alone = python(*arguments, cwd=tmp_path)
    assert (observed.returncode, observed.stdout) == (alone.returncode, alone.stdout)
    rows = observed.stderr.splitlines()
    assert [row for row in rows if "observability: " not in row] == alone.stderr.splitlines()


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
