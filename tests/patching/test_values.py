"""What a patched script records is what it prints, at the step that it names itself.

Of the shapes those that print `train STEP LOSS` and `val STEP LOSS` are run as a user runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, python

import observability as obs

SHAPES = {path.stem: path for path in (ROOT / "tests" / "shapes").glob("*.py")}
SAYS_ITS_LOSSES = sorted(n for n, path in SHAPES.items() if 'print("train", ' in path.read_text())


@pytest.mark.parametrize("name", SAYS_ITS_LOSSES)
def test_what_is_recorded_is_what_the_script_prints_at_its_own_step(tmp_path, name):
    script = tmp_path / SHAPES[name].name
    script.write_bytes(SHAPES[name].read_bytes())
    tool = ROOT / "patches" / "autopatch.py"
    subprocess.run([sys.executable, tool, "--write", script], check=True)
    done = python(script, cwd=tmp_path, env={**os.environ, "OBS_PLOT_INTERVAL": "0"})
    assert done.returncode == 0, done.stderr
    [run] = tmp_path.glob("out/*")
    printed = [line.split() for line in done.stdout.splitlines()]
    for word, key in (("train", "loss/train"), ("val", "loss/val_step")):
        said = [(int(row[1]), float(row[2])) for row in printed if row[0] == word]
        got = [(r["step"], r["metrics"][key]) for r in obs.read_run(run) if key in r["metrics"]]
        assert [step for step, _ in got] == [step for step, _ in said], word
        assert [loss for _, loss in got] == pytest.approx([loss for _, loss in said], rel=1e-6)
