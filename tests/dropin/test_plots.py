"""Plots: what a run's curves look like as an image, and when they are drawn."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from conftest import MAINRUN, python

import observability as obs
import observability_tools as tools

pytest.importorskip("matplotlib")


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def titles(run_dir: Path) -> dict[str, list[str]]:
    panels = tools.panels(tools.Recording(tools.Stream(run_dir)))
    return {title: list(curves) for title, curves in panels.items()}


def test_unlike_units_never_share_a_panel(open_run, run_dir):
    run = open_run()
    obs.validation(2.0, step=1, accuracy=0.5)
    for step in range(1, 5):
        rates = {"speed/step_s": 0.1, "speed/samples_per_sec_step": 8.0}
        rates["speed/tokens_per_sec_step"] = 64.0
        more = {"accuracy/train": 0.5, "wave_ratio": 0.25, "coherence_loss": 3.0}
        obs.step(step, loss=1.0, grad_norm=float("nan"), lr=0.1, **rates, **more)
    run.recorder.record("system", 4, {"system/rss_bytes": 1.0, "system/cpu_seconds": 1.0})
    obs.finish()
    assert titles(run_dir) == {
        "loss": ["loss/val_step", "loss/train"],
        "learning rate": ["lr"],
        "tokens per second": ["speed/tokens_per_sec_step"],
        "samples per second": ["speed/samples_per_sec_step"],
        "seconds per step": ["speed/step_s"],
        "gradient norm": ["grad_norm"],
        "memory in bytes": ["system/rss_bytes"],
        "accuracy": ["accuracy/val", "accuracy/train"],
        "wave_ratio": ["wave_ratio"],
        "coherence_loss": ["coherence_loss"],
    }
    assert size_of(tools.plot(run_dir))[0] == 1210


def test_a_run_without_a_number_is_drawn_too(open_run, run_dir):
    open_run()
    obs.finish()
    assert titles(run_dir) == {}
    size_of(tools.plot(run_dir))


def test_no_legend_hides_a_curve(open_run, run_dir):
    """Every legend is above its panel, and none reaches into another panel."""
    open_run()
    for step in range(1, 2000):
        loss = float("inf") if step == 77 else 1 / step
        obs.step(step, loss=loss, tokens=8, grad_norm=1.0, a_name_that_is_rather_long=1.0)
    obs.validation(0.5)
    obs.finish()
    figure = tools.drawing(tools.Recording(tools.Stream(run_dir)))
    figure.canvas.draw()
    inner = [axes.get_window_extent() for axes in figure.axes]
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
    for panel, legend in zip(inner, legends, strict=True):
        assert legend.y0 >= panel.y1 - 1
        assert not any(
            legend.overlaps(other) for other in [*inner, *legends] if other is not legend
        )
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["loss/train", "loss/train is not finite", "loss/val_step"]


def test_drawings_have_their_time_and_step_and_the_latest_is_the_last(open_run, run_dir):
    open_run()
    obs.step(1, loss=1.0)
    first = tools.plot(run_dir)
    obs.step(2, loss=0.5)
    obs.finish()
    second = tools.plot(run_dir)
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
        run = open_run("run", resume="auto")
        obs.watch(model, optimizer=optimizer)
        obs.resume()
        obs.save()
        obs.step(1 + resumed, loss=1.0)
        run.settle()
        obs.finish("failed: as by a kill")
        tools.plot(run_dir)
    assert len(list((run_dir / "plots").glob("curves_*"))) == 2
    recording = tools.Recording(tools.Stream(run_dir))
    steps, losses = recording.metrics["train", "loss/train"]
    assert (list(steps), list(losses)) == ([1, 2], [1.0, 1.0])
    assert (recording.resumed_at, recording.steps) == ([1], 2)


def test_of_a_long_curve_the_mean_and_the_range_are_drawn(open_run, run_dir):
    from matplotlib.figure import Figure

    open_run()
    for step in range(1, 3001):
        obs.step(step, loss=1000.0 if step == 1500 else float(step % 2))
    obs.finish()
    recording = tools.Recording(tools.Stream(run_dir))
    axes = Figure().add_subplot()
    tools.draw(axes, "loss", tools.panels(recording)["loss"], [])
    [line], [band] = axes.lines, axes.collections
    steps, losses = line.get_data()
    assert len(steps) <= 500
    assert (steps[0] < 10, steps[-1] > 2990) == (True, True)
    assert min(losses) == pytest.approx(0.5, abs=0.1)
    assert band.get_paths()[0].get_extents().bounds[1::2] == (0.0, 1000.0)  # no spike is lost


@pytest.mark.parametrize("interval", [0.2, 1000])
def test_a_run_draws_itself_at_the_interval_and_at_its_end(open_run, run_dir, interval):
    open_run(plot_interval=interval, drain_interval=0.05)
    obs.step(1, loss=1.0)
    if interval == 1000:
        obs.finish()
    until = time.monotonic() + 60
    while not list(run_dir.glob("plots/*_step_00000001.png")):
        assert time.monotonic() < until
        time.sleep(0.02)


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
