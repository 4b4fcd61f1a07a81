"""The claim that everything stands on: the observed run equals the unobserved one, bit for bit."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MAINRUN, ROOT, python

import observability as obs
from observability_tools import LogError, parity, read_curve

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="there is no GPU on this machine"
        ),
    ),
]

# Runs the script beside it on a small configuration, and keeps everything a run can end in.
DRIVER = """
import os, random, resource, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch, train
torch.set_num_threads(1)
{before}
model = train.main(train.Hyperparameters(
    block_size=16, batch_size=8, vocab_size=400, n_layer=2, n_head=2, d_model=32, lr=0.1,
    epochs=3, num_titles=400))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
random_state = [random.getstate(), torch.get_rng_state()]
if torch.cuda.is_available():
    random_state.append(torch.cuda.get_rng_state())
torch.save([model.state_dict(), random_state], sys.argv[1])
"""


def write_scripts(folder: Path, observed: bool, before: str = "") -> None:
    folder.mkdir(exist_ok=True)
    lines = (MAINRUN / "train.py").read_text().splitlines(keepends=True)
    kept = [line for line in lines if observed or not line.rstrip().endswith("# observability")]
    assert observed or len(kept) < len(lines)
    (folder / "train.py").write_text("".join(kept))
    (folder / "run.py").write_text(DRIVER.format(before=before))
    shutil.copy(MAINRUN / "titles.py", folder)
    if observed:
        shutil.copy(MAINRUN / "observability.py", folder)


def run_scripts(folder: Path, results: Path, device: str = "cpu"):
    """Losses as they were logged, final weights and random state."""
    results.mkdir()
    log, ended = results / "log", results / "ended"
    environment = {
        **os.environ,
        "LOG": str(log),
        "DEVICE": device,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OBS_DRAIN_INTERVAL": "0.05",
        "OBS_SYSTEM_INTERVAL": "0.05",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    done = subprocess.run(
        [sys.executable, folder / "run.py", ended],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [(e["event"], e["step"], e["loss"]) for e in lines if "loss" in e]
    return losses, torch.load(ended, weights_only=False), done.stderr


def same_bits(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


def assert_equal_runs(observed, unobserved) -> None:
    assert len(observed[0]) > 60
    assert observed[0] == unobserved[0]
    assert same_bits(observed[1], unobserved[1])


@pytest.fixture(scope="session")
def unobserved(tmp_path_factory):
    """The script without its marked lines, and without observability.py anywhere near."""
    folder = tmp_path_factory.mktemp("unobserved")
    write_scripts(folder / "scripts", observed=False)
    return {
        device: run_scripts(folder / "scripts", folder / device, device)
        for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    }


@pytest.mark.parametrize("device", DEVICES)
def test_the_observed_run_equals_the_unobserved_one(tmp_path, unobserved, device):
    write_scripts(tmp_path / "scripts", observed=True)
    observed = run_scripts(tmp_path / "scripts", tmp_path / "results", device)
    assert_equal_runs(observed, unobserved[device])
    [run_dir] = (tmp_path / "scripts/out").iterdir()
    journal = [
        (r["step"], r["metrics"]["loss/train"])
        for r in obs.read_run(run_dir)
        if "loss/train" in r["metrics"]
    ]
    assert journal == [(step, loss) for event, step, loss in observed[0] if "training" in event]
    points = [
        (r["step"], r["metrics"]["loss/val_step"])
        for r in obs.read_run(run_dir)
        if "loss/val_step" in r["metrics"]
    ]
    assert points == [(step, loss) for event, step, loss in observed[0] if "validation" in event]
    assert not json.loads((run_dir / "results.json").read_text())["degraded"]


def test_the_comparison_sees_a_single_random_number(tmp_path, unobserved):
    """What the proof is worth: one draw before the run, and nothing is equal."""
    write_scripts(tmp_path / "scripts", observed=True)
    script = tmp_path / "scripts/train.py"
    marked = "obs.init(config=args)  # observability\n"
    assert marked in script.read_text()
    script.write_text(script.read_text().replace(marked, f"{marked}    torch.rand(1)\n"))
    drawn = run_scripts(tmp_path / "scripts", tmp_path / "results")
    assert drawn[0] != unobserved["cpu"][0]
    assert not same_bits(drawn[1], unobserved["cpu"][1])


@pytest.mark.parametrize("package", ["rich.progress", "datasets", "transformers", "wandb"])
def test_what_the_script_imports_makes_no_difference(tmp_path, unobserved, package):
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    write_scripts(tmp_path / "scripts", observed=True, before=f"import {package}")
    observed = run_scripts(tmp_path / "scripts", tmp_path / "results")
    assert_equal_runs(observed, unobserved["cpu"])


# It draws from each generator that an import might draw from, and imports nothing that does. With
# every other seed a shuffle would pass over one number drawn before it.
SHUFFLED = """
import random, sys
import numpy, torch
import observability as obs  # observability
random.seed(7), numpy.random.seed(7), torch.manual_seed(7)
obs.init("shuffled", config={"lr": 0.1})  # observability
x, y = torch.randn(64, 4), torch.randn(64, 1)
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
obs.watch(model, optimizer=opt)  # observability
order = list(range(64))
obs.resume()  # observability
for epoch in range(2):
    if obs.skip_epoch(epoch): continue  # observability
    random.shuffle(order)
    for at in range(0, 64, 8):
        if obs.skip_batch(): continue  # observability
        batch = x[order[at : at + 8]] + 0.1 * float(numpy.random.rand()) * torch.randn(8, 4)
        loss = (model(batch) - y[order[at : at + 8]]).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        print(loss.item())
        obs.step(loss=loss, batch=batch)  # observability
    obs.validation(loss)  # observability
obs.finish()  # observability
print(random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist())
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def run_shuffled(folder: Path, **environment: str) -> list[str]:
    folder.mkdir()
    shutil.copy(MAINRUN / "observability.py", folder)
    shutil.copy(MAINRUN / "observability_tools.py", folder)
    script = SHUFFLED.splitlines(keepends=True)
    kept = [line for line in script if environment or not line.endswith("# observability\n")]
    (folder / "train.py").write_text("".join(kept))
    done = python(folder / "train.py", env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    """What the script prints without us, and in the end what is imported there."""
    return run_shuffled(tmp_path_factory.mktemp("shuffled") / "scripts")


@pytest.mark.parametrize(
    "environment",
    [
        {"OBS_DRAIN_INTERVAL": "0.01", "OBS_SYSTEM_INTERVAL": "0.01"},
        {"SAVE_INTERVAL": "1", "OBS_RESUME": "auto"},
        {"CODEX_MONITORING_ENABLE_GPU": "1", "OBS_PLOT_INTERVAL": "0.01"},
        {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    ],
    ids=["plain", "saving", "GPU and plots", "W&B"],
)
def test_a_training_that_shuffles_is_the_same_whatever_is_installed(
    tmp_path, shuffled, environment
):
    """rich.style draws from Python's generator when it is imported: nothing of ours may do so."""
    assert importlib.util.find_spec("rich")
    observed = run_shuffled(tmp_path / "scripts", **environment)
    assert observed[:-1] == shuffled[:-1]
    assert len(list(obs.read_run(tmp_path / "scripts" / "out" / "shuffled"))) > 16
    imported, elsewhere = (set(each[-1].split()) for each in (observed, shuffled))
    if "WANDB_MODE" not in environment:  # it brings many a package of its own
        assert imported - elsewhere - sys.stdlib_module_names == {"observability"}


KILL_TIMER = """
import ctypes, threading, time
def kill():
    def timers():  # one that is only about to start has no number yet
        return [t for t in threading.enumerate() if t.name == "observability" and t.ident]
    while not (found := timers()):
        time.sleep(0.001)
    ident = ctypes.c_ulong(found[0].ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
    found[0].join()
    print("the timer is dead", file=sys.stderr)
threading.Thread(target=kill, daemon=True).start()
"""
# The script's own log is 29 kB and the events are 21; the journal would come to 47.
LIMIT_FILES = "resource.setrlimit(resource.RLIMIT_FSIZE, (35_000, resource.RLIM_INFINITY))"
FILE_IN_THE_WAY = "open(os.path.dirname(__file__) + '/out', 'w')"


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (KILL_TIMER, "the timer is dead"),
        (LIMIT_FILES, "metrics.ndjson cannot be written"),
        (FILE_IN_THE_WAY, "the run directory is off"),
    ],
    ids=["killed timer", "no room", "a file in the way"],
)
def test_a_run_with_broken_sinks_is_still_equal(tmp_path, unobserved, before, said):
    write_scripts(tmp_path / "scripts", observed=True, before=before)
    observed = run_scripts(tmp_path / "scripts", tmp_path / "results")
    assert_equal_runs(observed, unobserved["cpu"])
    assert said in observed[2]


@pytest.fixture
def mounted(tmp_path):
    """A file system of its own, mounted with the options given; needs root."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "-q", folder], check=False)


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (0, "the run directory is off"),
        (40_000, "metrics.ndjson cannot be written"),
        (None, "the run directory is off"),
    ],
    ids=["full from the start", "full in mid-run", "read-only"],
)
def test_a_run_on_a_bad_disk_is_still_equal(tmp_path, unobserved, mounted, room, said):
    folder = mounted("size=4m")
    write_scripts(folder, observed=True)
    if room is None:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        fill(folder, room)
    observed = run_scripts(folder, tmp_path / "results")
    assert_equal_runs(observed, unobserved["cpu"])
    assert said in observed[2]


def fill(folder: Path, room: int) -> None:
    """Take all of the space but `room` bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(bytes(max(0, free - room)))
    if not room:
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (folder / "more").write_bytes(b"x")


# --- The baseline ---------------------------------------------------------------------------------


def start_small_run(folder: Path, change: tuple[str, str] | None = None) -> subprocess.Popen[bytes]:
    write_scripts(folder, observed=True)
    script = folder / "train.py"
    if change:
        assert script.read_text().count(change[0]) == 1
        script.write_text(script.read_text().replace(*change))
    environment = {**os.environ, "LOG": str(folder / "log"), "DEVICE": "cpu", "PRESET": "small"}
    return subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.DEVNULL)


def verdict(folder: Path) -> str:
    baseline = read_curve(ROOT / "tests/baselines/baseline_small.log")
    try:
        log = read_curve(folder / "log")
    except LogError:
        return "unfinished"
    about = baseline.about
    return str(parity(log, baseline, about["tolerance"], about["tolerance_last"])["verdict"])


def test_the_small_run_matches_its_baseline_at_every_point(tmp_path):
    process = start_small_run(tmp_path / "run")
    assert process.wait(600) == 0
    assert verdict(tmp_path / "run") == "match"


@pytest.mark.parametrize(
    "change",
    [
        ("lr=0.012,", "lr=0.01212,"),
        ("seed: int = 1337", "seed: int = 1338"),
        ("= lines[: self._train_count],", "= lines[: self._train_count][::-1],"),
    ],
    ids=["lr", "seed", "data order"],
)
def test_a_recipe_that_moved_fails_its_baseline(tmp_path, change):
    """lr by 1 %, the seed, the batches: ended as soon as a point is off."""
    process = start_small_run(tmp_path / "run", change)
    try:
        while process.poll() is None and verdict(tmp_path / "run") == "unfinished":
            time.sleep(0.5)
        assert verdict(tmp_path / "run") in ("differs", "another dataset")
    finally:
        process.kill()
        process.wait()
