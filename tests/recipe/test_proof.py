"""The claim that everything stands on: the observed run equals the unobserved one, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MAINRUN, ROOT

import observability as obs

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
import os, random, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch, train
torch.set_num_threads(1)
{before}
model = train.main(train.Hyperparameters(
    block_size=16, batch_size=8, vocab_size=400, n_layer=2, n_head=2, d_model=32, lr=0.1,
    epochs=3, num_titles=400))
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


KILL_TIMER = """
import ctypes, threading, time, observability
def kill():
    while observability._run is None:
        time.sleep(0.001)
    ident = observability._run._timer.ident
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(SystemExit))
threading.Thread(target=kill, daemon=True).start()
"""
LIMIT_FILES = """
import resource, observability
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (KILL_TIMER, ""),
        (LIMIT_FILES.format(250_000), "the run directory is off"),  # not even the ring fits
        ("import os; open(os.path.dirname(__file__) + '/out', 'w')", "the run directory is off"),
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


@pytest.mark.parametrize("case", ["full from the start", "full in mid-run", "read-only"])
def test_a_run_on_a_bad_disk_is_still_equal(tmp_path, unobserved, mounted, case):
    room = {"full from the start": "300k", "full in mid-run": "632k", "read-only": "4m"}[case]
    folder = mounted(f"size={room}")
    write_scripts(folder, observed=True)
    if case == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    observed = run_scripts(folder, tmp_path / "results")
    assert_equal_runs(observed, unobserved["cpu"])
    assert "is off" in observed[2]


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
    baseline = obs.read_curve(ROOT / "tests/baselines/baseline_small.log")
    try:
        log = obs.read_curve(folder / "log")
    except obs.LogError:
        return "unfinished"
    about = baseline.about
    return str(obs.parity(log, baseline, about["tolerance"], about["tolerance_last"])["verdict"])


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
