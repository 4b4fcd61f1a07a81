"""One file: copied beside a script it needs nothing else, and taken away it leaves no trace."""

from __future__ import annotations

import difflib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MAINRUN, ROOT, python

import observability as obs
import observability_tools as tools

MARK = "# observability\n"
PATCH = ROOT / "patches" / "mainrun.patch"

# Prints which modules the import of the file added, and how many threads there are after it.
IMPORT = """
import json, sys, threading
before = set(sys.modules)
import observability
added = {name.partition(".")[0] for name in set(sys.modules) - before} - {"observability"}
foreign = added - sys.stdlib_module_names
print(json.dumps([sorted(added), sorted(foreign), threading.active_count()]))
"""

# The reference recipe of a size that takes seconds.
TINY = """
import train
train.main(train.Hyperparameters(block_size=16, batch_size=8, vocab_size=300, n_layer=1, n_head=2,
                                 d_model=8, epochs=2, num_titles=300))
"""


def interpreters():
    """Those of 3.10 to 3.13 that the machine has, and the one that runs the tests."""
    found = {}
    for minor in range(10, 14):
        installed = Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")
        for path in filter(None, (shutil.which(f"python3.{minor}"), *installed)):
            code = "import sys; print(*sys.version_info[:2], sep='.')"
            done = subprocess.run([path, "-c", code], capture_output=True, text=True)
            if done.stdout.strip() == f"3.{minor}":  # a shim may stand for nothing
                found[f"3.{minor}"] = str(path)
    return {**found, "running": sys.executable}


PYTHONS = interpreters()


@pytest.fixture(params=PYTHONS)
def bare(request):
    """A Python with its standard library alone: -S leaves out whatever is installed."""

    def run(*arguments, **options):
        command = [PYTHONS[request.param], "-S", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)

    assert run("-c", "import torch").returncode != 0
    return run


@pytest.fixture
def folder(tmp_path):
    """A folder with observability.py and nothing else."""
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(MAINRUN / "observability.py", folder)
    return folder


# --- The drop-in alone ----------------------------------------------------------------------------


def test_the_commands_work_without_torch(bare, open_run, run_dir, folder):
    shutil.copy(MAINRUN / "observability_tools.py", folder)
    open_run()
    obs.step(1, loss=2.0)
    obs.validation(1.5)
    obs.finish()
    done = bare(folder / "observability.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "summarize" in done.stdout
    done = bare(folder / "observability.py", "summarize", run_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[:5] == ["run", "completed", "1", "2", "1.5"]
    done = bare(folder / "observability.py", "parity", run_dir, run_dir, "--exact")
    assert (done.returncode, done.stderr) == (0, "")
    assert "matches at all 1 points" in done.stdout
    done = bare(folder / "observability.py", "rebuild", run_dir)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_commands_it_says_in_one_line_what_to_copy(bare, folder):
    for command in (["--help"], ["summarize", "out/first"]):
        done = bare(folder / "observability.py", *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert "copy observability_tools.py beside this file" in done.stderr


def test_a_copied_file_records_a_run_without_torch(bare, folder):
    lines = "import observability as obs\nobs.init('first', config={'lr': 0.1})\n"
    lines += (
        "for i in range(1, 4):\n    obs.step(i, loss=1 / i)\nobs.validation(0.25)\nobs.finish()"
    )
    (folder / "script.py").write_text(lines)
    done = bare("script.py", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "")
    run_dir = folder / "out" / "first"
    assert done.stderr.splitlines() == [
        f"observability: start at step 0: recording in {run_dir}",
        f"observability: completed at step 3: {run_dir}",
    ]
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock",
        "config.json",
        "metrics.ndjson",
        "results.json",
        "run_manifest.json",
        "training.log",
    ]
    assert list((folder / "logs" / "tb" / "first").glob("events.out.tfevents.*"))
    assert [r["step"] for r in obs.read_run(run_dir) if r["tags"]["phase"] == "train"] == [1, 2, 3]
    results = obs.read_sealed(run_dir / "results.json")
    assert (results["status"], results["steps"]) == ("completed", 3)
    assert results["final_val_loss"] == 0.25


def test_an_import_starts_nothing_and_says_nothing(bare, folder):
    done = bare("-B", "-c", IMPORT, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    added, _, threads = json.loads(done.stdout)
    assert not {"asyncio", "socket", "argparse", "multiprocessing"} & set(added)
    assert threads == 1
    assert [path.name for path in folder.iterdir()] == ["observability.py"]


def test_an_import_leaves_installed_packages_alone(folder):
    added, foreign, _ = json.loads(python("-c", IMPORT, cwd=folder).stdout)
    assert foreign == []  # neither torch nor numpy nor what else is installed here
    assert "mmap" in added


# --- The observed script and the one without us ---------------------------------------------------


def unmarked():
    lines = (MAINRUN / "train.py").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.endswith(MARK))


def test_the_patch_is_the_marked_lines_and_removes_none():
    marked = [line for line in (MAINRUN / "train.py").open() if line.endswith(MARK)]
    lines = PATCH.read_text().splitlines(keepends=True)[2:]
    assert [line[1:] for line in lines if line.startswith("+")] == marked
    assert len(marked) == 9
    assert [line for line in lines if line.startswith("-")] == []


def test_the_patch_is_up_to_date():
    observed = (MAINRUN / "train.py").read_text()
    sides = [text.splitlines(keepends=True) for text in (unmarked(), observed)]
    names = ("a/mainrun/train.py", "b/mainrun/train.py")
    assert "".join(difflib.unified_diff(*sides, *names)) == PATCH.read_text()


@pytest.mark.parametrize("tool", [["patch", "-s", "-R", "-p1", "-i"], ["git", "apply", "-R"]])
def test_reversing_the_patch_gives_the_script_without_its_marked_lines(tmp_path, tool):
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed; the other one is tested")
    script = tmp_path / "mainrun" / "train.py"
    script.parent.mkdir()
    shutil.copy(MAINRUN / "train.py", script)
    subprocess.run([*tool, PATCH], cwd=tmp_path, check=True)
    assert script.read_text() == unmarked()
    assert "observability" not in unmarked()
    forward = ["-N" if word == "-R" else word for word in tool if tool[0] == "patch"]
    subprocess.run([*(forward or tool[:2]), PATCH], cwd=tmp_path, check=True)
    assert script.read_text() == (MAINRUN / "train.py").read_text()


def test_the_unobserved_script_runs_without_the_drop_in_anywhere(tmp_path):
    (tmp_path / "train.py").write_text(unmarked())
    shutil.copy(MAINRUN / "titles.py", tmp_path)
    check = "import importlib.util as u; assert u.find_spec('observability') is None\n"
    done = python("-c", check + TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = tools.read_curve(tmp_path / "logs" / "mainrun.log")
    assert len(log.points) > 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "logs",
        "titles.py",
        "train.py",
    ]


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("", {"HOME": "/proc/nowhere"}),
        ("", {"ATEN_CPU_CAPABILITY": "default"}),
        ("import sys; sys.modules['numpy'] = None", {}),
        ("import sys; sys.modules['structlog'] = None", {}),
    ],
    ids=["unwritable home", "no AVX", "no numpy", "no structlog"],
)
def test_it_runs_where_little_is_there(folder, before, environment):
    """Without a terminal in every case: input and output are pipes."""
    (folder / "train.py").write_text(
        f"{before}\nimport torch, observability as obs\nobs.init('run')\n"
        "for step in range(1, 101): obs.step(step, loss=torch.tensor(1 / step))\nobs.finish()\n"
    )
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert done.returncode == 0, done.stderr
    said = [line.split(": ") for line in done.stderr.splitlines() if "observability:" in line]
    assert [words[1] for words in said] == ["start at step 0", "completed at step 100"]
    steps = [r["step"] for r in obs.read_run(folder / "out/run") if r["tags"]["phase"] == "train"]
    assert steps == list(range(1, 101))
    assert list(folder.glob("logs/tb/run/events*"))
