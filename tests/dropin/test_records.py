"""The journal and TensorBoard: nothing lost, nothing twice, all readable, whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MAINRUN, python, read_json, records
from disks import mounted
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import wait_for_words, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

import observability as obs


def tensorboard_points(directory: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard's own reader, which checks every CRC, finds there."""
    points = []
    for path in sorted(directory.rglob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                points.append((event.step, value.tag, value.tensor.float_val[0]))
    return points


def first_difference(a, b):
    """None for equal sequences. pytest's own comparison takes minutes over long lists."""
    pairs = enumerate(itertools.zip_longest(a, b))
    return next(((index, x, y) for index, (x, y) in pairs if x != y), None)


def steps_of(run_dir: Path, filename: str = "metrics.ndjson") -> list[int]:
    found = obs.read_run(run_dir, filename)
    return [r["step"] for r in found if r["tags"]["phase"] == "train"]


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
    form = obs.Form(json.dumps([{"phase": "train"}, *names]))
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


def train(init, *, steps, fail=False):
    """A training with a checkpoint and an evaluation a step."""
    import torch

    model = torch.nn.Linear(2, 1)
    run = init(save_interval=1, resume="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    obs.watch(model, optimizer=optimizer)
    step = obs.resume(step=0)
    while step < steps:
        step += 1
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        obs.validation(2 / step)
        obs.step(step, loss=1 / step, carry={"step": step})
        run.settle()
    obs.log({"after": 1.0})
    obs.finish("failed: here" if fail else "completed")
    return run


def test_every_event_file_begins_with_a_session_start_at_step_0(open_run, tmp_path):
    for steps in (2, 4, 6):
        run = train(open_run, steps=steps, fail=True)
    files = sorted((tmp_path / "tb" / run.name).iterdir())
    assert len(files) == 3
    for path in files:
        version, start, *rest = EventFileLoader(str(path)).Load()
        assert version.file_version == "brain.Event:2"
        assert (start.step, start.session_log.status) == (0, SessionLog.START)
        assert all(event.summary.value for event in rest)


def test_the_newest_event_file_of_a_resumed_run_holds_the_whole_curve(open_run, tmp_path):
    """With the older ones beside it TensorBoard shows each point once, though it is open."""
    directory = tmp_path / "tb" / "run"
    directory.mkdir(parents=True)
    beneath = EventAccumulator(str(directory)).Reload()  # open all the while
    directory.rmdir()
    for steps in (2, 4, 6):
        run = train(open_run, steps=steps, fail=steps < 6)
        afterwards = EventAccumulator(str(directory)).Reload()
        for curves in (beneath.Reload(), afterwards):
            for tag in ("loss/train", "loss/val_step"):
                assert [event.step for event in curves.Scalars(tag)] == list(range(1, steps + 1))
    *_, newest = sorted(directory.iterdir())
    events = [e for e in EventFileLoader(str(newest)).Load() if e.summary.value]
    kept = [r for r in obs.read_run(run.dir) if r["metrics"]]
    tags = [(e.step, [v.tag for v in e.summary.value]) for e in events]
    assert tags == [(r["step"], list(r["metrics"])) for r in kept]


KILLED_AND_RESUMED = """
import os, sys, time, torch, observability as obs
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = obs.init("run", save_interval=3, resume="auto", drain_interval=0.05, system_interval=0)
obs.watch(model, optimizer=optimizer)
step = obs.resume(step=0)
while step < 40:
    step += 1
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    obs.validation(1 / step)
    obs.step(step, loss=2 / step)
    run.settle()
    time.sleep(0.01)
    if step == int(sys.argv[1]):
        time.sleep(0.3)  # what is redone has been shown
        os.kill(os.getpid(), 9)
obs.finish()
"""


@contextlib.contextmanager
def tensorboard(logdir: Path, fast: str) -> Iterator[Callable[[str], list[int]]]:
    """A server over that folder; gives the steps of a curve as its page gets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--load_fast", fast, "--reload_interval", "1", "--port", port, "--logdir", logdir]
    command = [sys.executable, "-m", "tensorboard.main", *map(str, options)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def steps(tag: str) -> list[int]:
        query = urllib.parse.urlencode({"run": "run", "tag": tag})
        url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?{query}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return [step for _, step, _ in json.load(answer)]
        except OSError:  # not yet
            return []

    try:
        yield steps
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("fast", ["true", "false"])
def test_kill_and_resume_beneath_an_open_tensorboard_give_one_curve(tmp_path, fast):
    (tmp_path / "train.py").write_text(KILLED_AND_RESUMED)
    env = {**os.environ, "PYTHONPATH": str(MAINRUN)}
    with tensorboard(tmp_path / "logs/tb", fast) as shown:
        for kill_at in (20, 31, 0):
            assert python(tmp_path / "train.py", kill_at, env=env).returncode == (
                -9 if kill_at else 0
            )
            last = kill_at or 40
            wait_until(lambda last=last: shown("loss/train")[-1:] == [last])
        for tag in ("loss/train", "loss/val_step"):
            wait_until(lambda tag=tag: shown(tag) == list(range(1, 41)))


# --- The journal ----------------------------------------------------------------------------------


def test_the_journal_is_strict_json_and_each_line_has_its_sum(open_run, run_dir):
    open_run()
    obs.step(1, loss=math.nan, a=math.inf, b=-math.inf, c=1.5)
    obs.step(2, loss=1e308, a=1e308)  # each is finite and their sum is not
    obs.log({"naïve % name": 1.0})
    obs.finish()

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    for line in (run_dir / "metrics.ndjson").read_bytes().splitlines():
        record = json.loads(line, parse_constant=refuse)
        assert list(record) == ["schema", "seq", "time", "step", "metrics", "tags", "crc"]
        assert record["crc"] == zlib.crc32(line[: line.rindex(b',"crc":')])
    first, second, third = (r["metrics"] for r in records(run_dir, "train"))
    assert first == {"loss/train": "NaN", "a": "Infinity", "b": "-Infinity", "c": 1.5}
    assert second == {"loss/train": 1e308, "a": 1e308}
    assert third == {"naïve % name": 1.0}


def test_records_are_numbered_without_gaps(open_run, run_dir):
    open_run(drain_interval=0.01)
    for _ in range(5000):
        obs.step(loss=1.0)
    obs.validation(1.0)
    obs.finish()
    numbers = [r["seq"] for r in obs.read_run(run_dir)]
    assert len(numbers) == 5003
    assert first_difference(numbers, range(1, 5004)) is None


def test_a_line_is_in_the_file_when_the_call_returns(open_run, run_dir):
    open_run(drain_interval=60)
    for step in range(1, 4):
        obs.step(step, loss=1.0)
        assert steps_of(run_dir) == list(range(1, step + 1))
        assert (run_dir / "metrics.ndjson").read_bytes().endswith(b"}\n")


def test_the_timer_hands_the_events_on_while_the_script_goes_on(open_run, run_dir, tmp_path):
    open_run(drain_interval=0.02)
    obs.step(1, loss=1.0)
    wait_until(lambda: tensorboard_points(tmp_path / "tb") == [(1, "loss/train", 1.0)])


@pytest.mark.parametrize("name", ["metrics.ndjson", "metrics_eval.ndjson"])
def test_the_journal_is_cut_into_shards_and_read_as_one(open_run, run_dir, name):
    open_run(shard_bytes=20_000, metrics_filename=name)
    for _ in range(3000):
        obs.step(loss=1.0)
    newest = f'"step":{3000},'.encode()
    assert newest in (run_dir / name).read_bytes()
    obs.finish()
    stem = name.removesuffix(".ndjson")
    files = sorted(path.name for path in run_dir.glob(f"{stem}*.ndjson"))
    assert len(files) > 10
    assert files == [*(f"{stem}.{n:04d}.ndjson" for n in range(1, len(files))), name]
    assert first_difference(steps_of(run_dir, name), range(1, 3001)) is None
    numbers = [r["seq"] for r in obs.read_run(run_dir, name)]
    assert first_difference(numbers, range(1, 3003)) is None


def test_a_shard_has_an_age_too(open_run, run_dir):
    open_run(shard_age=0.05, drain_interval=0.01)
    steps = itertools.count(1)
    wait_until(lambda: obs.step(next(steps), loss=1.0) or len(obs.shards(run_dir)) > 3)
    obs.finish()
    step = next(steps) - 1
    assert first_difference(steps_of(run_dir), range(1, step + 1)) is None
    assert (run_dir / "metrics.0003.ndjson").exists()


def test_shards_that_were_taken_away_are_not_written_over(open_run, run_dir):
    open_run(shard_bytes=500)
    for step in range(1, 30):
        obs.step(step, loss=1.0)
    kept = obs.shards(run_dir)[-2]
    content = kept.read_bytes()
    for path in obs.shards(run_dir)[:-2]:
        path.unlink()  # archived, as it may be
    for step in range(30, 60):
        obs.step(step, loss=1.0)
    obs.finish()
    assert kept.read_bytes() == content
    steps = steps_of(run_dir)
    assert steps == list(range(steps[0], 60))


def test_ten_thousand_shards_are_read_in_their_order(open_run, run_dir):
    open_run(shard_bytes=1)  # a line a shard
    obs.step(1, loss=1.0)
    obs.shards(run_dir)[-2].rename(run_dir / "metrics.9998.ndjson")
    for step in range(2, 6):
        obs.step(step, loss=1.0)
    obs.finish()
    assert (run_dir / "metrics.10002.ndjson").exists()
    assert steps_of(run_dir) == [1, 2, 3, 4, 5]


def test_what_is_no_shard_is_not_read(open_run, run_dir):
    open_run()
    obs.step(1, loss=1.0)
    obs.finish()
    line = (run_dir / "metrics.ndjson").read_bytes().splitlines(keepends=True)[1]
    for name in (
        "metrics.old.ndjson",
        "metrics.0001.ndjson.bak",
        "metrics.1b.ndjson",
        "x.1.ndjson",
    ):
        (run_dir / name).write_bytes(line)
    assert steps_of(run_dir) == [1]


def test_where_no_new_shard_can_be_had_the_old_one_goes_on(tmp_path):
    """And no file of the script's own is written into, whatever number it has."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "nr_inodes=40", "tmpfs") as disk:
        run = obs.Run(
            "run",
            out_dir=disk,
            tb_dir=tmp_path / "tb",
            system_interval=0,
            drain_interval=0.01,
            shard_bytes=2000,
        )
        with contextlib.suppress(OSError):  # no more files than there are
            for number in range(100):
                (disk / f"{number}").touch()
        for step in range(1, 101):
            run.step(step, loss=1.0)
        time.sleep(0.1)
        with contextlib.ExitStack() as stack:
            own = [stack.enter_context((tmp_path / f"{n}").open("w")) for n in range(20)]
            for step in range(101, 201):
                run.step(step, loss=1.0)
            for number in range(10):
                (disk / f"{number}").unlink()
            for step in range(201, 301):
                run.step(step, loss=1.0)
            run.finish()
            assert [Path(file.name).stat().st_size for file in own] == [0] * 20
        assert first_difference(steps_of(run.dir), range(1, 301)) is None
        results = read_json(run.dir / "results.json")
        assert (results["lost_records"], results["degraded"]) == (0, {})
        assert len(obs.shards(run.dir)) > 2


def test_where_no_file_can_be_opened_the_journal_goes_on(tmp_path):
    script = f"""
import os, resource, observability as obs
run = obs.init("run", out_dir={str(tmp_path)!r}, tb_dir={str(tmp_path / "tb")!r}, shard_bytes=2000,
               system_interval=0, drain_interval=0.01)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
os.close(free := os.dup(0))
resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
for step in range(1, 101):
    obs.step(step, loss=1.0)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
for step in range(101, 201):
    obs.step(step, loss=1.0)
obs.finish()
"""
    done = python("-c", script, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    assert "failed" not in done.stderr
    assert first_difference(steps_of(tmp_path / "run"), range(1, 201)) is None


# --- Read back ------------------------------------------------------------------------------------


@pytest.fixture
def journal(open_run, run_dir):
    """Twenty steps, one record a line."""
    open_run()
    for step in range(1, 21):
        obs.step(step, loss=1 / step, lr=0.5)
    obs.finish()
    return run_dir / "metrics.ndjson"


def test_a_record_is_found_by_its_number(journal):
    numbers = [r["seq"] for r in obs.read_run(journal.parent, after=5, until=9)]
    assert numbers == [6, 7, 8, 9]


def test_any_flipped_bit_costs_its_record_and_is_named(journal):
    whole = journal.read_bytes()
    rng = random.Random(7)
    for _ in range(300):
        at = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        journal.write_bytes(damaged)
        damage: list[str] = []
        found = [r["seq"] for r in obs.read_run(journal.parent, damage=damage)]
        assert damage, at
        missing = set(range(1, 23)) - set(found)
        # A line end that is gone costs two: where one ends and the next begins is not known.
        assert 1 <= len(missing) <= 2
        assert set(found) <= set(range(1, 23))


def test_a_torn_last_line_is_left_out_and_gone_on_behind(journal, open_run):
    torn = journal.read_bytes()[:-17]
    journal.write_bytes(torn)
    damage: list[str] = []
    assert [r["seq"] for r in obs.read_run(journal.parent, damage=damage)] == list(range(1, 22))
    [said] = damage
    assert "line 22" in said
    settings = obs.Settings()
    again = obs.Journal(journal, settings)
    again.write(torn.splitlines(keepends=True)[1].replace(b"\n", b"") + b"\n")
    again.close()
    assert [r["seq"] for r in obs.read_run(journal.parent)] == [*range(1, 22), 2]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\0" * 4096,
        b'{"seq":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"x" * 300_000,
    ],
    ids=["empty", "object", "list", "null", "no text", "zeros", "deep", "long"],
)
def test_a_line_that_is_no_record_is_named_and_the_others_are_read(journal, line):
    lines = journal.read_bytes().splitlines(keepends=True)
    crc = b',"crc":%d}' % zlib.crc32(line)
    for hostile in (line, line + crc):  # with a sum that is right, too
        journal.write_bytes(b"".join([*lines[:9], hostile + b"\n", *lines[9:]]))
        damage: list[str] = []
        found = [r["seq"] for r in obs.read_run(journal.parent, damage=damage)]
        assert found == list(range(1, 23))
        assert [said for said in damage if "line 10" in said] == damage != []


@pytest.mark.parametrize("with_sum", [True, False])
def test_a_newer_schema_is_refused_by_name(journal, with_sum):
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    body = first.partition(b',"crc":')[0].replace(b'{"schema":1,', b'{"schema":2,')
    newer = b'%b,"crc":%d}\n' % (body, zlib.crc32(body)) if with_sum else body + b"}\n"
    journal.write_bytes(b"".join([newer, *rest]))
    with pytest.raises(obs.RunError, match="schema 2, this file knows up to 1"):
        list(obs.read_run(journal.parent))


@pytest.mark.parametrize("kind", ["nothing", "fifo", "folder", "device"])
def test_what_is_no_journal_is_refused_by_name_and_at_once(tmp_path, kind):
    path = tmp_path / "metrics.ndjson"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    began = time.monotonic()
    with pytest.raises((obs.ObservabilityError, OSError), match=str(tmp_path)):
        list(obs.read_run(tmp_path))
    assert time.monotonic() - began < 1


def test_a_living_run_can_be_read(open_run, run_dir):
    open_run(drain_interval=60)
    obs.step(1, loss=1.0)
    reader = "import sys, observability as obs\n"
    reader += "print(obs.alive(sys.argv[1]), len(list(obs.read_run(sys.argv[1]))))"
    done = python("-c", reader, run_dir, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    assert done.stdout == "True 2\n", done.stderr


# --- Killed ---------------------------------------------------------------------------------------

KILLED = """
import mmap, sys, observability as obs
obs.init("run", out_dir=sys.argv[1], tb_dir=sys.argv[1] + "/tb", system_interval=0,
         drain_interval=float(sys.argv[2]), shard_bytes=int(sys.argv[3]))
with open(sys.argv[1] + "/done", "r+b") as file:
    done = mmap.mmap(file.fileno(), 8)
step = 0
while True:
    step += 1
    obs.step(step, loss=1 / step, tokens=step)
    done[:] = step.to_bytes(8, "little")
"""


def kill_at_random(folder: Path, wait: float, *arguments: object) -> tuple[int, Path]:
    """How many steps a run had recorded when it was killed, and where it lies."""
    done = folder / "done"
    done.write_bytes(bytes(8))
    command = [sys.executable, "-c", KILLED, folder, *arguments]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": str(MAINRUN)}
    )
    while not int.from_bytes(done.read_bytes(), "little"):
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return int.from_bytes(done.read_bytes(), "little"), folder / "run"


# Long form: OBS_KILLS=200. An interval of 1 ms has the timer at work at nearly every kill.
@pytest.mark.parametrize("drain_interval", [0.001, 1.0])
@pytest.mark.parametrize("shard_bytes", [0, 2000])
def test_a_sigkill_loses_no_step_and_doubles_none(tmp_path, drain_interval, shard_bytes):
    rng = random.Random(drain_interval)
    for index in range(int(os.environ.get("OBS_KILLS", 8)) // 4):
        folder = tmp_path / str(index)
        folder.mkdir()
        steps, run_dir = kill_at_random(folder, rng.random() / 4, drain_interval, shard_bytes)
        before = {path: path.read_bytes() for path in obs.shards(run_dir)}
        damage: list[str] = []
        found = [r["step"] for r in obs.read_run(run_dir, damage=damage)][1:]
        # The step that was being recorded may be there, though its call had not returned.
        assert len(found) in (steps, steps + 1)
        assert first_difference(found, range(1, len(found) + 1)) is None
        assert len(damage) <= 1  # the last line
        assert {path: path.read_bytes() for path in obs.shards(run_dir)} == before
        shown = [p[0] for p in tensorboard_points(folder / "tb") if p[1] == "loss/train"]
        assert first_difference(shown, found[: len(shown)]) is None


# --- Taken away, cut and filled up ----------------------------------------------------------------


def test_a_journal_that_is_cut_from_outside_goes_on(open_run, run_dir, capfd):
    """As a log rotation does it. It was a SIGBUS when the file was mapped."""
    open_run(drain_interval=0.01)
    for step in range(1, 101):
        obs.step(step, loss=1.0)
    os.truncate(run_dir / "metrics.ndjson", 0)
    for step in range(101, 201):
        obs.step(step, loss=1.0)
    obs.finish()
    assert steps_of(run_dir) == list(range(101, 201))
    assert read_json(run_dir / "results.json")["steps"] == 200


def test_a_line_that_is_cut_from_outside_costs_the_next_one_at_most(open_run, run_dir):
    open_run(drain_interval=0.01)
    for step in range(1, 101):
        obs.step(step, loss=1.0)
    journal = run_dir / "metrics.ndjson"
    os.truncate(journal, journal.stat().st_size - 7)
    for step in range(101, 201):
        obs.step(step, loss=1.0)
    obs.finish()
    assert set(range(1, 201)) - set(steps_of(run_dir)) <= {100, 101}


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_journal_that_is_taken_away_is_begun_anew(open_run, run_dir, capfd, how):
    open_run(drain_interval=0.01)
    journal, elsewhere = run_dir / "metrics.ndjson", run_dir / "elsewhere"
    obs.step(1, loss=1.0)
    if how == "removed":
        journal.unlink()
    elif how == "moved":
        journal.rename(elsewhere)
    else:  # as an editor saves
        shutil.copy(journal, elsewhere)
        elsewhere.replace(journal)
    # To read what is captured over and over could lose what a thread says just then.
    wait_until(lambda: any("removed or replaced" in said for said in list(obs._said)))
    for step in range(2, 101):
        obs.step(step, loss=1.0)
    obs.finish()
    assert steps_of(run_dir)[how == "replaced" :] == list(range(2, 101))
    assert read_json(run_dir / "run_manifest.json")["degraded"] == {}


def test_a_run_whose_directory_is_taken_away_goes_on_and_says_so(
    open_run, run_dir, tmp_path, capfd
):
    open_run(drain_interval=0.01)
    obs.step(1, loss=1.0)
    run_dir.rename(tmp_path / "elsewhere")
    # To read what is captured over and over could lose what a thread says just then.
    wait_until(lambda: any("removed or replaced" in said for said in list(obs._said)))
    time.sleep(0.1)  # the timer tries again and again
    for step in range(2, 101):
        obs.step(step, loss=1.0)
    run_dir.mkdir()  # somebody puts it back
    wait_until((run_dir / "metrics.ndjson").exists)
    obs.step(101, loss=1.0)
    obs.finish()
    assert steps_of(run_dir) == [101]
    assert "failed" not in capfd.readouterr().err


def test_a_full_disk_costs_nothing_where_it_has_room_again(tmp_path, capfd):
    """The line that was cut short is gone on with, and what waited follows in its order."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=512k", "tmpfs") as disk:
        run = obs.Run(
            "run", out_dir=disk, tb_dir=tmp_path / "tb", system_interval=0, drain_interval=0.01
        )
        for step in range(1, 101):
            run.step(step, loss=1.0)
        ballast = disk / "ballast"
        subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=1000"], capture_output=True)
        for step in range(101, 2001):
            run.step(step, loss=1.0)
        time.sleep(0.1)
        assert first_difference(steps_of(run.dir)[:100], range(1, 101)) is None
        ballast.unlink()
        wait_until(lambda: steps_of(run.dir)[-1:] == [2000])
        for step in range(2001, 2101):
            run.step(step, loss=1.0)
        run.finish()
        damage: list[str] = []
        found = [r["step"] for r in obs.read_run(run.dir, damage=damage) if r["metrics"]]
        assert first_difference(found, range(1, 2101)) is None
        assert damage == []
        assert read_json(run.dir / "results.json")["lost_records"] == 0
    assert capfd.readouterr().err.count("its lines wait in memory") == 1


def test_a_disk_that_stays_full_costs_the_record_and_the_loss_is_counted(tmp_path, capfd):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as disk:
        run = obs.Run("run", out_dir=disk / "out", tb_dir=tmp_path / "tb", system_interval=0)
        for step in range(1, 4001):
            run.step(step, loss=1.0)
        run.finish()
        found = steps_of(run.dir)
        assert 100 < len(found) < 4000
        assert first_difference(found, range(1, len(found) + 1)) is None
    said = capfd.readouterr().err
    assert said.count("its lines wait in memory") == 1
    assert "the training goes on" not in said  # nothing of ours broke
    shown = [p[0] for p in tensorboard_points(tmp_path / "tb") if p[1] == "loss/train"]
    assert first_difference(shown, range(1, 4001)) is None


def test_a_limit_on_file_sizes_ends_the_record_not_the_script(tmp_path):
    """And memory stays bounded: of what waits for the disk it keeps so many lines."""
    script = f"""
import observability as obs, resource
obs.init("run", out_dir={str(tmp_path)!r}, tb_dir={str(tmp_path / "tb")!r}, tensorboard=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for step in range(1, 150_001):
    obs.step(step, loss=1.0, tokens=1)
obs.finish()
print("done")
"""
    done = python("-c", script, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    assert done.stdout == "done\n"
    assert done.stderr.count("its lines wait in memory") == 1
    found = steps_of(tmp_path / "run")
    assert first_difference(found, range(1, len(found) + 1)) is None
    lost = read_json(tmp_path / "run/results.json")["lost_records"]
    assert 0 <= lost - (150_000 - len(found)) <= 5  # an event or two


# --- Sinks that break -----------------------------------------------------------------------------


def test_a_failing_sink_is_dropped_said_once_and_recorded(tmp_path, capfd):
    """A real write that fails: the disk of the events is full."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=16k", "tmpfs") as disk:
        run = obs.Run("run", out_dir=tmp_path / "out", tb_dir=disk, drain_interval=0.01)
        for step in range(1, 1001):
            run.step(step, loss=1.0)
        said = wait_for_words(capfd, "TensorBoard is off")
        run.finish()
    said += capfd.readouterr().err
    assert said.count("TensorBoard is off from step") == 1
    assert "at the end of the run these were off: TensorBoard" in said
    assert len(records(run.dir, "train")) == 1000
    assert "No space left" in read_json(run.dir / "run_manifest.json")["degraded"]["TensorBoard"]
    assert "No space left" in read_json(run.dir / "results.json")["degraded"]["TensorBoard"]
    assert records(run.dir, "event")[-1]["tags"]["degraded"] == "TensorBoard"


def test_a_journal_that_cannot_be_opened_is_said_and_the_rest_is_written(
    open_run, run_dir, tmp_path, capfd
):
    run_dir.mkdir(parents=True)
    (run_dir / "metrics_eval.ndjson").mkdir()
    open_run(metrics_filename="metrics_eval.ndjson")
    obs.step(1, loss=1.0)
    obs.finish()
    assert "the journal is off from step 0" in capfd.readouterr().err
    assert "the journal" in read_json(run_dir / "results.eval.json")["degraded"]
    assert tensorboard_points(tmp_path / "tb") == [(1, "loss/train", 1.0)]


HANGS = "threading.Event().wait()"  # for ever; its thread is a daemon, and ends with the tests


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package of the name wandb, as it is where its service hangs or fails."""

    def write(log: str) -> None:
        (tmp_path / "wandb.py").write_text(
            "import threading\nclass Client:\n def define_metric(self, *a, **k): pass\n"
            f" def log(self, *a, **k): {log}\n def finish(self): pass\n"
            "def init(**k): return Client()\n"
        )

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield write
    sys.modules.pop("wandb", None)


def test_a_sink_that_hangs_costs_itself_and_not_the_run(open_run, run_dir, stand_in):
    stand_in(HANGS)
    open_run(wandb=True, drain_interval=0.01, close_timeout=0.2)
    began = time.monotonic()
    for step in range(1, 5001):
        obs.step(step, loss=1.0)
    obs.finish()
    assert time.monotonic() - began < 10
    assert first_difference(steps_of(run_dir), range(1, 5001)) is None
    assert read_json(run_dir / "results.json")["lost_records"] == 0


def test_a_failed_run_whose_sink_hangs_keeps_what_it_recorded(open_run, run_dir, stand_in):
    stand_in(HANGS)
    open_run(wandb=True, drain_interval=0.01, close_timeout=0.2)
    obs.step(1, loss=1.0)
    time.sleep(0.1)
    obs.finish("failed: early")
    assert steps_of(run_dir) == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_timer_loses_nothing(open_run, run_dir, tmp_path):
    """A SystemExit thrown into the thread ends it for real."""
    before = set(threading.enumerate())
    open_run(drain_interval=0.01)
    [timer] = set(threading.enumerate()) - before
    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
    throw(ctypes.c_ulong(timer.ident), ctypes.py_object(SystemExit))
    timer.join(10)
    assert not timer.is_alive()
    for step in range(1, 5001):
        obs.step(step, loss=1.0)
    obs.finish()
    assert first_difference(steps_of(run_dir), range(1, 5001)) is None
    shown = [p[0] for p in tensorboard_points(tmp_path / "tb") if p[1] == "loss/train"]
    assert first_difference(shown, range(1, 5001)) is None


def test_memory_stays_flat(open_run):
    open_run(drain_interval=0.05)
    for _ in range(5000):
        obs.step(loss=1.0, tokens=1)
    time.sleep(0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100_000):
        obs.step(loss=1.0, tokens=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB
