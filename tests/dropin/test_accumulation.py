"""`loss/train` is one thing, of an untouched script as of a patched one: what the script prints.

But for a script that prints the mean of its micro-batches, which only a call site can give.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import MAINRUN, ROOT, python, records

SHAPES = ROOT / "tests" / "shapes"
ACCUMULATE = [path.stem for path in SHAPES.glob("accumulation_*.py")]
ACCUMULATE += ["accumulate_context", "amp_flag", "loss_scaler"]
# The patcher leaves out the step behind the loop, for what remained of the epoch.
LEFT_OUT = {"accumulation_remainder": [4, 8]}


def losses(folder, *command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = python(*command, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    [run] = (folder / "out").iterdir()
    found = [r["metrics"] for r in records(run, "train") if "loss/train" in r["metrics"]]
    return [each["loss/train"] for each in found]


@pytest.mark.parametrize("name", sorted(ACCUMULATE))
def test_an_untouched_script_has_the_losses_of_the_patched_one(tmp_path, name):
    plain, patched = tmp_path / "plain", tmp_path / "patched"
    for folder in (plain, patched):
        folder.mkdir()
        (folder / "train.py").write_bytes((SHAPES / f"{name}.py").read_bytes())
    subprocess.run(
        [sys.executable, ROOT / "patches/autopatch.py", "--write", patched / "train.py"],
        check=True,
        capture_output=True,
    )
    untouched = losses(plain, MAINRUN / "observability.py", "run", "train.py")
    given = losses(patched, "train.py")
    for at in reversed(LEFT_OUT.get(name, [])):
        del untouched[at - 1]
    assert len(given) > 3
    assert untouched == pytest.approx(given, rel=1e-6)
