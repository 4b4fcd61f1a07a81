"""The curve of a run that was killed and resumed is one curve, in a reader that is open too."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from faults.scripts import Script
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.grpc_provider import GrpcDataProvider
from tensorboard.data.provider import RunTagFilter
from tensorboard.util.tensor_util import make_ndarray

import observability as obs

TRAINING = """
import os, time, torch
from torch.utils.data import DataLoader, TensorDataset
import observability as obs

torch.manual_seed(1)
data = TensorDataset(torch.randn(20, 4), torch.randn(20, 1))
model = torch.nn.Linear(4, 1)
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
loader = DataLoader(data, 4, shuffle=True)
kill_at, hold_at = (int(os.environ.get(name, "0")) for name in ("KILL_AT", "HOLD_AT"))
run = obs.init("run")
obs.watch(model, optimizer=opt)
step = 0
step = obs.resume(step=step)
print("from", step)
for epoch in range(1, 5):
    if obs.skip_epoch(epoch): continue
    for x, y in loader:
        if obs.skip_batch(): continue
        loss = (model(x) - y).square().mean()
        if os.environ.get("SPOILED"):  # as by another version of a library
            loss = loss + 1e-3
        opt.zero_grad()
        loss.backward()
        opt.step()
        step += 1
        if step % 5 == 3: obs.validation(loss.item() + 1, accuracy=step)
        obs.step(step, loss=loss, batch=x)
        run.settle()
        if step == hold_at:
            print("holds")
            while not os.path.exists("go"): time.sleep(0.01)
        if step == kill_at: os.kill(os.getpid(), 9)
    obs.validation(loss.item() + 1)
obs.finish()
"""
SAVING = {"SAVE_INTERVAL": 4, "OBS_RESUME": "auto", "OBS_SAVE_BEST": 0}
TAGS = ["loss/train", "lr", "loss/val_step", "accuracy/val", "loss/val"]
Curves = dict[str, list[tuple[int, float]]]


class PythonReader:
    """What TensorBoard reads by without its fast loader."""

    def __init__(self, logdir: Path) -> None:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        self._logdir, self._events = logdir, EventMultiplexer(size_guidance={"tensors": 0})

    def read(self) -> Curves:
        self._events.AddRunsFromDirectory(str(self._logdir))
        self._events.Reload()
        tags = self._events.Runs().get("run", {}).get("tensors", [])
        return {
            tag: [
                (event.step, float(make_ndarray(event.tensor_proto)))
                for event in self._events.Tensors("run", tag)
            ]
            for tag in tags
        }


class FastReader:
    """TensorBoard's data server, which reads again each second."""

    def __init__(self, logdir: Path) -> None:
        port_file = logdir.with_name("port")
        port_file.unlink(missing_ok=True)
        binary = pytest.importorskip("tensorboard_data_server").server_binary()
        if binary is None:
            pytest.skip("there is no fast loader for this platform")
        command = [binary, f"--logdir={logdir}", "--port=0", f"--port-file={port_file}"]
        command += ["--reload=1", "--samples-per-plugin=scalars=10000"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not port_file.exists() or not port_file.read_text().strip():
            time.sleep(0.01)
        address = f"localhost:{port_file.read_text().strip()}"
        self._data = GrpcDataProvider(address, _stub(address))

    def read(self) -> Curves:
        ctx, kind = RequestContext(), "scalars"
        found = self._data.read_scalars(
            ctx,
            experiment_id="",
            plugin_name=kind,
            downsample=10_000,
            run_tag_filter=RunTagFilter(runs=["run"]),
        )
        curves = found.get("run", {})
        return {tag: [(p.step, p.value) for p in points] for tag, points in curves.items()}


def _stub(address: str) -> object:
    from tensorboard.data.proto import data_provider_pb2_grpc

    return data_provider_pb2_grpc.TensorBoardDataProviderStub(grpc.insecure_channel(address))


@contextmanager
def reader_of(kind: str, logdir: Path) -> Iterator[Callable[[], Curves]]:
    if kind == "python":
        yield PythonReader(logdir).read
        return
    reader = FastReader(logdir)
    try:
        yield reader.read
    finally:
        reader.process.kill()
        reader.process.wait()


def journal(run_dir: Path) -> Curves:
    """As a reader of TensorBoard's, that knows single precision, must show it."""
    curves: Curves = {tag: [] for tag in TAGS}
    for record in obs.read_run(run_dir):
        for tag in curves.keys() & record["metrics"].keys():
            step = record["tags"].get("epoch", record["step"])
            curves[tag].append((step, float(np.float32(record["metrics"][tag]))))
    return curves


def shown(read: Callable[[], Curves], expected: Curves, seconds: float = 15) -> Curves:
    """What it shows once it shows that, or in the end."""
    until = time.monotonic() + seconds
    while True:
        curves = {tag: points for tag, points in read().items() if tag in TAGS}
        if curves == expected or time.monotonic() > until:
            return curves
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["python", "fast"])
def test_a_reader_that_is_open_shows_one_curve_through_kills_and_resumes(tmp_path, kind):
    script = Script(tmp_path / "work", TRAINING)
    running = script.start(**SAVING, HOLD_AT=6, KILL_AT=9).until("holds")
    run_dir = script.out / "run"
    with reader_of(kind, script.folder / "logs/tb") as read:
        first = shown(read, {tag: points for tag, points in journal(run_dir).items() if points})
        assert [step for step, _ in first["loss/train"]] == [1, 2, 3, 4, 5, 6]
        (script.folder / "go").touch()
        running.wait(-9)
        read()
        for kill_at, begins in ((14, 8), (15, 12)):
            assert script.killed(**SAVING, KILL_AT=kill_at).lines("from") == [str(begins)]
            steps = [step for step, _ in read().get("loss/train", [])]
            assert steps == sorted(set(steps))
        ended = script.run(**SAVING)
        assert ended.lines("from") == ["12"]
        expected = journal(run_dir)
        assert [step for step, _ in expected["loss/train"]] == [*range(1, 21)]
        assert [epoch for epoch, _ in expected["loss/val"]] == [1, 2, 3, 4]
        assert shown(read, expected) == expected
    with reader_of(kind, script.folder / "logs/tb") as read:  # one that is opened only now
        assert shown(read, expected) == expected
    straight = Script(tmp_path / "straight", TRAINING)
    straight.run(**SAVING)
    assert journal(straight.out / "run") == expected


def test_steps_that_are_made_again_are_compared_bit_for_bit(tmp_path):
    script = Script(tmp_path / "work", TRAINING)
    killed = script.killed(**SAVING, KILL_AT=11)
    again = script.killed(**SAVING, KILL_AT=10)
    assert "bit for bit" not in killed.said + again.said
    before = dict(journal(script.out / "run")["loss/train"])
    spoiled = script.run(**SAVING, SPOILED=1)
    [said] = [line for line in spoiled.said.splitlines() if "not bit for bit" in line]
    after = {
        r["step"]: float(r["metrics"]["loss/train"])
        for r in obs.read_run(script.out / "run")
        if "loss/train" in r["metrics"]
    }
    assert "at step 9 " in said
    assert f"the loss is {after[9]!r}" in said
    assert np.float32(float(said.rpartition("it was ")[2])) == np.float32(before[9])


def test_a_jump_that_was_there_before_the_interruption_is_none(tmp_path):
    """The loss is what the script says it is: here 9.0 at step 9, before the kill and after."""
    jumps = TRAINING.replace("loss=loss, batch", "loss=9.0 if step == JUMP else 1.0, batch")
    script = Script(tmp_path / "work", jumps.replace("JUMP", "9"))
    script.killed(**SAVING, KILL_AT=10)
    again = script.killed(**SAVING, KILL_AT=10)
    assert again.lines("from") == ["8"]
    assert "jumps" not in again.said


def test_a_loss_that_jumps_at_a_resume_is_said_with_both_numbers(tmp_path):
    jumps = TRAINING.replace("loss=loss, batch", "loss=JUMP, batch")
    script = Script(tmp_path / "work", jumps.replace("JUMP", "1.0"))
    script.killed(**SAVING, KILL_AT=9)
    ended = Script(script.folder, jumps.replace("JUMP", "7.5")).run(**SAVING)
    assert "the loss jumps at the resume: 7.5 at step 9, 1 before it" in ended.said
