"""Plots: what a run's curves look like as an image, and when they are drawn."""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path

import pytest
from conftest import MAINRUN, python

import observability as obs

pytest.importorskip("matplotlib")


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_each_kind_of_curve_that_a_run_has_gets_a_panel(open_run, run_dir):
    open_run()
    for step in range(1, 5):
        obs.step(step, loss=1.0 / step)
    obs.finish()
    few = size_of(obs.plot(run_dir))
    open_run("more")
    obs.watch()
    obs.validation(2.0, step=1)
    for step in range(1, 5):
        obs.step(step, loss=float("nan"), tokens=8, grad_norm=1.0, other=3.0)
    obs.finish()
    more = size_of(obs.plot(run_dir.with_name("more")))
    assert more[0] == few[0]
    assert more[1] == pytest.approx(few[1] * (1 + 3 * 2.2) / (1 + 2.2), rel=0.01)


def test_drawings_have_their_time_and_step_and_the_latest_is_the_last(open_run, run_dir):
    open_run()
    obs.step(1, loss=1.0)
    obs._run.drain()
    first = obs.plot(run_dir)
    obs.step(2, loss=0.5)
    obs.finish()
    second = obs.plot(run_dir)
    assert first.name.endswith("_step_00000001.png")
    assert second.name.endswith("_step_00000002.png")
    assert (run_dir / "plots/latest.png").read_bytes() == second.read_bytes()
    assert sorted(p.name for p in (run_dir / "plots").iterdir()) == [
        first.name,
        second.name,
        "latest.png",
    ]


def test_a_resume_is_marked_and_keeps_what_was_drawn_before(open_run, run_dir, tiny_model):
    model, optimizer = tiny_model
    for resumed in (False, True):
        open_run("run", save_interval=1, resume="auto")
        obs.watch(model, optimizer=optimizer)
        obs.resume()
        obs.step(1 + resumed, loss=1.0)
        obs._run._keeper.wait()
        obs.finish("failed: as by a kill")
        obs.plot(run_dir)
    assert len(list((run_dir / "plots").glob("curves_*"))) == 2
    curves, resumes, steps = obs._curves(run_dir)
    assert (curves["loss/train"], resumes, steps) == ([(1, 1.0), (2, 1.0)], [1], 2)


def test_a_long_curve_is_thinned_but_keeps_its_ends(open_run, run_dir, monkeypatch):
    monkeypatch.setattr(obs, "_POINTS", 50)
    open_run()
    for step in range(1, 301):
        obs.step(step, loss=float(step))
    obs.finish()
    points = obs._curves(run_dir)[0]["loss/train"]
    assert len(points) <= 50
    assert points[-1] == (300, 300.0)
    assert points == sorted(points)


def test_a_run_draws_itself_at_the_interval_and_at_its_end(open_run, run_dir):
    open_run(plot_interval=0.2, drain_interval=0.05)
    obs.step(1, loss=1.0)
    until = time.monotonic() + 60
    while not list(run_dir.glob("plots/*_step_00000001.png")):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert "matplotlib" not in sys.modules or obs._run._drawing is not None
    obs.step(2, loss=1.0)
    drawn = obs._run
    obs.finish()
    assert drawn._drawing.wait(60) == 0
    assert list(run_dir.glob("plots/*_step_00000002.png"))


def test_without_matplotlib_the_command_says_how_to_install_it(open_run, run_dir, tmp_path):
    open_run()
    obs.step(1, loss=1.0)
    obs.finish()
    hidden = f"import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, {str(MAINRUN)!r})"
    asked = f"import observability; sys.exit(observability.main(['plot', {str(run_dir)!r}]))"
    done = python("-c", f"{hidden}; {asked}")
    assert done.returncode == 2
    assert "pip install matplotlib" in done.stderr
    assert not (run_dir / "plots").exists()
