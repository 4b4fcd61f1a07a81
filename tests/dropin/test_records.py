"""From the ring to the journal and to TensorBoard: nothing lost, nothing twice, all readable."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import MAINRUN, python, read_json, records
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import observability as obs


def tensorboard_points(directory: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard's own reader, which checks every CRC, finds there."""
    points = []
    for path in sorted(directory.rglob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                points.append((event.step, value.tag, value.tensor.float_val[0]))
    return points


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_reads_the_seeds_tags(open_run, tmp_path, tiny_model):
    model, optimizer = tiny_model
    open_run()
    obs.watch(model, optimizer=optimizer)
    for epoch in (1, 2):
        obs.skip_epoch(epoch)
        for step in (1, 2, 3):
            model(model.weight).sum().backward()
            optimizer.step()
            obs.step(3 * (epoch - 1) + step, loss=1 / step, tokens=64)
        obs.validation(epoch / 4)
    obs.finish()
    points = tensorboard_points(tmp_path / "tb")
    assert [p[0] for p in points if p[1] == "loss/train"] == [1, 2, 3, 4, 5, 6]
    assert [(p[0], p[2]) for p in points if p[1] == "loss/val"] == [(1, 0.25), (2, 0.5)]
    assert [p[0] for p in points if p[1] == "loss/val_step"] == [3, 6]
    assert [p[0] for p in points if p[1] == "speed/tokens_per_sec"] == [1, 2]
    assert {p[2] for p in points if p[1] == "lr"} == {0.5}
    assert "speed/tokens_per_sec_step" in {p[1] for p in points}


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
        min_size=1,
        max_size=6,
        unique=True,
    ),
    step=st.integers(-(2**62), 2**62),
    value=st.floats(),
    wall=st.floats(0, 1e12),
)
def test_any_event_is_read_back_by_tensorboard(tmp_path_factory, names, step, value, wall):
    directory = tmp_path_factory.mktemp("events")
    sink = obs.TensorBoard(directory)
    form = obs._Form(json.dumps([{"phase": "train"}, *names]).encode())
    sink.write([obs.Record(form, 1, wall, step, [value] * len(names))])
    sink.close()
    [path] = directory.iterdir()
    *_, event = EventFileLoader(str(path)).Load()
    assert (event.step, event.wall_time) == (step, wall)
    assert [v.tag for v in event.summary.value] == names
    try:
        expected = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        expected = math.copysign(math.inf, value)
    for got in event.summary.value:
        number = got.tensor.float_val[0]
        assert number == expected or (math.isnan(number) and math.isnan(expected))


# --- The journal ----------------------------------------------------------------------------------


def test_the_journal_is_strict_json(open_run, run_dir):
    open_run()
    obs.step(1, loss=math.nan, a=math.inf, b=-math.inf, c=1.5)
    obs.finish()

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    for line in (run_dir / "metrics.ndjson").read_text().splitlines():
        record = json.loads(line, parse_constant=refuse)
        assert set(record) == {"schema", "seq", "time", "step", "metrics", "tags"}
    [record] = records(run_dir, "train")
    assert record["metrics"] == {"loss/train": "NaN", "a": "Infinity", "b": "-Infinity", "c": 1.5}


def test_records_are_numbered_without_gaps(open_run, run_dir):
    open_run(drain_interval=0.01)
    for _ in range(5000):
        obs.step(loss=1.0)
    obs.validation(1.0)
    obs.finish()
    numbers = [r["seq"] for r in obs.read_run(run_dir)]
    assert len(numbers) == 5003
    assert first_difference(numbers, range(1, 5004)) is None


def test_the_journal_is_cut_into_shards_and_read_as_one(open_run, run_dir, monkeypatch):
    monkeypatch.setattr(obs, "SHARD_BYTES", 20_000)
    open_run()
    for _ in range(3000):
        obs.step(loss=1.0)
    obs.finish()
    shards = sorted(run_dir.glob("metrics*.ndjson"))
    assert len(shards) > 3
    steps = [r["step"] for r in records(run_dir, "train")]
    assert first_difference(steps, range(1, 3001)) is None


def test_a_clean_finish_leaves_no_ring(open_run, run_dir):
    open_run()
    assert (run_dir / "metrics.ring").exists()
    obs.finish()
    assert not (run_dir / "metrics.ring").exists()


def test_the_timer_writes_while_the_script_goes_on(open_run, run_dir):
    open_run(drain_interval=0.02)
    obs.step(1, loss=1.0)
    deadline = time.monotonic() + 10
    path = run_dir / "metrics.ndjson"
    while "loss/train" not in path.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "loss/train" in path.read_text()


def first_difference(a, b):
    """None for equal sequences. pytest's own comparison takes minutes over long lists."""
    pairs = enumerate(itertools.zip_longest(a, b))
    return next(((index, x, y) for index, (x, y) in pairs if x != y), None)


# --- Killed ---------------------------------------------------------------------------------------

KILLED = """
import mmap, sys, observability as obs
obs.init("run", out_dir=sys.argv[1], tb_dir=sys.argv[1], drain_interval=float(sys.argv[2]),
         system_interval=0)
with open(sys.argv[1] + "/done", "r+b") as file:
    done = mmap.mmap(file.fileno(), 8)
step = 0
while True:
    step += 1
    obs.step(step, loss=1 / step, tokens=step)
    done[:] = step.to_bytes(8, "little")
"""


def kill_at_random(folder: Path, drain_interval: float, wait: float) -> tuple[int, Path]:
    """How many steps a run had recorded when it was killed, and where it lies."""
    done = folder / "done"
    done.write_bytes(bytes(8))
    command = [sys.executable, "-c", KILLED, str(folder), str(drain_interval)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    while not int.from_bytes(done.read_bytes(), "little"):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return int.from_bytes(done.read_bytes(), "little"), folder / "run"


# Long form: OBS_KILLS=100. An interval of 1 ms has the drain at work at nearly every kill.
@pytest.mark.parametrize("drain_interval", [0.001, 1.0])
def test_a_sigkill_loses_no_step_and_doubles_none(tmp_path, drain_interval):
    rng = random.Random(drain_interval)
    for index in range(int(os.environ.get("OBS_KILLS", 4)) // 2 or 1):
        folder = tmp_path / str(index)
        folder.mkdir()
        steps, run_dir = kill_at_random(folder, drain_interval, rng.random() / 2)
        assert obs.summary(run_dir)["status"] == "killed"
        found = [r["step"] for r in records(run_dir, "train")]
        # The step that was being recorded may be there, though its call had not returned.
        assert len(found) in (steps, steps + 1)
        assert first_difference(found, range(1, len(found) + 1)) is None
        obs.rebuild(run_dir)
        assert first_difference(found, [r["step"] for r in records(run_dir, "train")]) is None
        shown = [p[0] for p in tensorboard_points(folder) if p[1] == "loss/train"]
        assert first_difference(found, shown) is None
        assert not (run_dir / "metrics.ring").exists()


@pytest.mark.parametrize("missing", [17, 1])  # 1: only the end of the line
def test_a_torn_line_is_made_whole_from_the_ring(tmp_path, missing):
    _, run_dir = kill_at_random(tmp_path, 0.001, 0.1)
    whole = list(obs.read_run(run_dir))
    last = run_dir / "metrics.ndjson"
    os.truncate(last, last.stat().st_size - missing)  # a write that the kill cut short
    assert first_difference(obs.read_run(run_dir), whole) is None
    obs.rebuild(run_dir)
    assert first_difference(obs.read_run(run_dir), whole) is None
    assert last.read_text().endswith("\n")


def test_a_torn_record_in_the_ring_is_not_read(tmp_path, open_run, run_dir):
    open_run(drain_interval=60)
    for step in (1, 2, 3):
        obs.step(step, loss=float(step))
    ring = run_dir / "metrics.ring"
    at = obs._run._seq % obs.Ring.SLOTS * obs.Ring.SLOT
    size = struct.unpack_from("<I", obs._run._ring.memory, at)[0]
    obs._run._ring.memory[at + size - 8 : at + size] = bytes(8)  # its last field was not stored
    left = obs.Ring.left_behind(ring, 0)
    assert [r.step for r in left if r.form.tags["phase"] == "train"] == [1, 2]


def test_a_living_run_is_read_but_not_repaired(open_run, run_dir):
    open_run(drain_interval=60)
    obs.step(1, loss=1.0)
    reader = "import sys, observability as obs; r = obs.Path(sys.argv[1]); obs.repair(r);"
    reader += "print(obs.summary(r)['status'], obs.summary(r)['steps'])"
    done = python("-c", reader, run_dir, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    assert done.stdout == "running 1\n", done.stderr
    assert (run_dir / "metrics.ring").exists()


def test_a_run_that_reads_itself_is_still_known_to_be_alive(open_run, run_dir):
    open_run()
    list(obs.read_run(run_dir))
    assert obs.alive(run_dir)
    reader = "import sys, observability as obs; print(obs.alive(obs.Path(sys.argv[1])))"
    done = python("-c", reader, run_dir, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    assert done.stdout == "True\n", done.stderr


def test_a_killed_run_is_dead_though_its_worker_lives(tmp_path):
    script = f"""
import os, sys, observability as obs
obs.init("run", out_dir={str(tmp_path)!r}, tb_dir={str(tmp_path)!r})
obs.step(1, loss=1.0)
if os.fork() == 0:
    print(os.getpid(), flush=True)
sys.stdin.read()  # until the test ends
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(MAINRUN)},
    )
    worker = int(process.stdout.readline())
    try:
        assert obs.alive(tmp_path / "run")
        process.kill()
        process.wait()
        assert not obs.alive(tmp_path / "run")
        assert obs.summary(tmp_path / "run")["status"] == "killed"
    finally:
        os.kill(worker, signal.SIGKILL)


# --- Broken ---------------------------------------------------------------------------------------


class Broken:
    def __init__(self, error):
        self.error = error

    def write(self, records):
        raise self.error

    def close(self):
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("odd")])
def test_a_failing_sink_is_dropped_said_once_and_recorded(open_run, run_dir, capfd, error):
    run = open_run()
    run._sinks.insert(0, Broken(error))
    for step in range(1, 4):
        obs.step(step, loss=1.0)
        run.drain()
    obs.finish()
    assert capfd.readouterr().err.count("Broken is off from step 1 on") == 1
    assert len(records(run_dir, "train")) == 3
    assert "Broken" in read_json(run_dir / "run_manifest.json")["degraded"]
    assert "Broken" in read_json(run_dir / "results.json")["degraded"]


def test_a_full_disk_ends_the_metrics_not_the_script(tmp_path):
    """A real write that fails: no file of this process may grow beyond 3 MB."""
    script = f"""
import observability as obs, resource, signal
obs.init("run", out_dir={str(tmp_path)!r}, tb_dir={str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
for step in range(1, 50_001):
    obs.step(step, loss=1.0, tokens=1)
obs.finish()
print("done")
"""
    done = python("-c", script, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    assert done.stdout == "done\n"
    assert done.stderr.count("Journal is off") == 1
    steps = [r["step"] for r in records(tmp_path / "run", "train")]
    # What was written stays readable, and the ring keeps the latest.
    assert first_difference(steps[:10_000], range(1, 10_001)) is None
    assert first_difference(steps, sorted(set(steps))) is None
    assert steps[-1] == 50_000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_timer_loses_nothing(open_run, run_dir):
    """A SystemExit thrown into the thread ends it for real; the script's thread then drains."""
    open_run(drain_interval=0.01)
    timer = obs._run._timer
    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
    throw(ctypes.c_ulong(timer.ident), ctypes.py_object(SystemExit))
    timer.join(10)
    assert not timer.is_alive()
    for step in range(1, 5001):
        obs.step(step, loss=1.0)
    obs.finish()
    steps = [r["step"] for r in records(run_dir, "train")]
    assert first_difference(steps, range(1, 5001)) is None


def test_a_sink_that_hangs_costs_records_not_the_run(open_run, run_dir, capfd):
    release = threading.Event()

    class Hangs(Broken):
        def write(self, records):
            release.wait(30)

    run = open_run(drain_interval=0.01, close_timeout=0.2)
    run._sinks.append(Hangs(None))
    start = time.monotonic()
    for step in range(1, 5001):
        obs.step(step, loss=1.0)
    obs.finish()
    assert time.monotonic() - start < 10
    release.set()
    assert read_json(run_dir / "results.json")["lost_records"] > 0


def test_memory_stays_flat(open_run):
    open_run()
    for _ in range(5000):
        obs.step(loss=1.0, tokens=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100_000):
        obs.step(loss=1.0, tokens=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2000  # kB
