"""What a checkpoint survives: damage, kills, full and failing disks, power cuts, hostile files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from faults.campaign import FILES, Campaign, newest_step
from faults.scripts import Ended, Script, on_a_bad_disk, tree
from torch import nn

import observability as obs

CHANGES = (
    "open",
    "write",
    "posix_fallocate",
    "ftruncate",
    "fsync",
    "close",
    "mkdir",
    "rename",
    "unlink",
    "rmdir",
)


needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")


def commit(directory: Path, step: int, size: int = 5000) -> Path:
    """A checkpoint of plain bytes, with a store of its own as a new process would have."""
    store = obs.CheckpointStore(directory, keep_last=2)
    content = bytes([step % 251]) * size + f"step {step}".encode()
    return store.commit(step, dict.fromkeys(FILES[:-1], content), lambda: {"step": step})


def in_child(job: Callable[[], None]) -> int:
    """Run `job` in a fork of this process; its exit status, -9 for a kill, 70 for an OSError."""
    child = os.fork()
    if child == 0:
        code = 71
        try:
            job()
            code = 0
        except OSError:
            code = 70
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --- Damage ------------------------------------------------------------------------------------


def damages(data: bytes) -> Iterator[bytes]:
    yield from (b"", data[: len(data) // 2], data[:-1], data + b"\0", bytes(len(data)))
    draw = random.Random(len(data))
    for _ in range(200):
        at = draw.randrange(8 * len(data))
        flipped = data[at // 8] ^ (1 << at % 8)
        yield data[: at // 8] + bytes([flipped]) + data[at // 8 + 1 :]


@pytest.fixture
def two_steps(tmp_path: Path) -> obs.CheckpointStore:
    """Two whole checkpoints of a small training."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    store = obs.CheckpointStore(tmp_path / "checkpoints")
    saver = obs.Saver(store)
    state = dict.fromkeys(obs.KINDS, []) | {"model": [model], "optimizer": [optimizer]}
    others = {"rng_state.pt": obs.rng_state(()), "run_manifest.json": b"{}"}
    for step in (1, 2):
        saver.save(step, lambda: {**obs.capture(state), **others}, lambda: {"epoch": 1}, wait=60)
    assert saver.failed == 0
    return store


@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_found_and_the_older_one_taken(two_steps, name, capfd):
    store, file = two_steps, two_steps.path(2) / name
    original = file.read_bytes()
    for damaged in damages(original):
        file.write_bytes(damaged)
        assert obs.latest_ckpt(store.directory) == store.path(1)
    file.unlink()
    assert obs.latest_ckpt(store.directory) == store.path(1)
    assert f"checkpoint {store.path(2)} is damaged" in capfd.readouterr().err
    file.write_bytes(original)
    assert obs.latest_ckpt(store.directory) == store.path(2)


# --- Stops at every file operation -------------------------------------------------------------


@contextmanager
def failing_at(count: int, fail: Callable[[], None], *, once: bool) -> Iterator[list[str]]:
    """Count the calls that change files, of this process alone, and `fail` before the count-th."""
    seen: list[str] = []
    real = {name: getattr(os, name) for name in CHANGES}

    def recorded(name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            seen.append(name)
            goes_on = not once and 0 < count < len(seen) and name in ("write", "fsync")
            if len(seen) == count or goes_on:
                if name == "write":  # a torn one
                    real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                fail()
            return real[name](*args, **kwargs)

        return call

    for name in CHANGES:
        setattr(os, name, recorded(name))
    try:
        yield seen
    finally:
        for name in CHANGES:
            setattr(os, name, real[name])


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name), symlinks=True))


def operations(directory: Path) -> list[str]:
    with failing_at(0, lambda: None, once=True) as seen:
        commit(directory, 3)
    return seen


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_one_whole(tmp_path):
    for step in (1, 2):
        commit(tmp_path / "start", step)
    total = len(operations(copied(tmp_path / "start", "count")))
    assert total > 30
    found = []
    for count in range(1, total + 1):
        run = copied(tmp_path / "start", f"kill{count}")

        def job(run: Path = run, count: int = count) -> None:
            with failing_at(count, lambda: os.kill(os.getpid(), signal.SIGKILL), once=True):
                commit(run, 3)

        assert in_child(job) == -signal.SIGKILL
        found.append(newest_step(run))
        assert commit(run, 4) == run / "step_00000004"
        assert not list(run.glob(".*"))
        assert newest_step(run) == 4
        assert (run / "latest").resolve() == run / "step_00000004"
    assert set(found) == {2, 3}
    assert found == sorted(found)


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_an_error_at_any_file_operation_leaves_the_older_ones_alone(tmp_path, number, once):
    for step in (1, 2):
        commit(tmp_path / "start", step)
    total = len(operations(copied(tmp_path / "start", "count")))

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    for count in range(1, total + 1):
        run = copied(tmp_path / "start", f"fail{count}")
        with suppress(OSError), failing_at(count, fail, once=once):
            commit(run, 3)
        assert newest_step(run) in (2, 3)
        assert not list(run.glob(".corrupt-*"))
        assert commit(run, 4)
        assert newest_step(run) == 4


# --- Kills at random instants of a real run ----------------------------------------------------


def test_a_run_killed_at_any_instant_goes_on_to_the_same_last_digit(tmp_path):
    """`make faults` does it hundreds of times."""
    campaign = Campaign(tmp_path, seed=1)
    campaign.run(3)
    campaign.run(2, in_a_row=3)
    assert campaign.failures == []
    assert campaign.kills >= 9
    assert campaign.torn
    assert campaign.resumes


# --- Disks that fill and fail ------------------------------------------------------------------


@contextmanager
def mounted(at: Path, *options: str) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine lets us mount nothing: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def saver_at(directory: Path) -> tuple[obs.Saver, Callable[[int], bool]]:
    saver = obs.Saver(obs.CheckpointStore(directory, keep_last=5))
    state = dict.fromkeys(obs.KINDS, []) | {"model": [nn.Linear(500, 500)]}
    return saver, lambda step: saver.save(step, lambda: obs.capture(state), dict, wait=60)


def test_a_disk_that_fills_up_costs_the_save_and_nothing_else(tmp_path, capfd):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=3500k", "tmpfs") as disk:
        saver, save = saver_at(disk / "run")
        for step in (1, 2, 3, 4, 5):
            save(step)
        assert saver.failed == 2
        assert "step 4 was not saved: [Errno 28] No space left" in capfd.readouterr().err
        assert newest_step(disk / "run") == 3
        assert not list((disk / "run").glob(".*"))


def test_a_disk_that_turns_read_only_costs_the_save_and_nothing_else(tmp_path, capfd):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=9m", "tmpfs") as disk:
        saver, save = saver_at(disk / "run")
        save(1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        save(2)
        assert "Read-only" in capfd.readouterr().err
        assert newest_step(disk / "run") == 1
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        save(2)
        assert saver.failed == 1
        assert newest_step(disk / "run") == 2


def test_a_limit_on_file_sizes_costs_the_save_and_nothing_else(tmp_path):
    commit(tmp_path, 1)

    def job() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        commit(tmp_path, 2, size=200_000)

    assert in_child(job) == 70
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


STORE = """
import observability as obs
store = obs.CheckpointStore("checkpoints")
files = dict.fromkeys(("model.pth", "optimizer.pt"), b"new" * 9999)
try:
    store.commit(2, files, dict)
except OSError as error:
    print("failed", error.errno)
else:
    print("saved")
"""


@needs_gcc
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_error_of_the_disk_itself_is_no_saved_checkpoint(tmp_path, call):
    scripts = [Script(tmp_path / str(at), STORE) for at in range(9)]
    for script in scripts:
        commit(script.folder / "checkpoints", 1)
    orders = {"DISK_PATH": ".tmp-step", "DISK_CALL": call, "DISK_ERRNO": errno.EIO, "DISK_ONCE": 1}
    ended = on_a_bad_disk([(s, {**orders, "DISK_AT": at}) for at, s in enumerate(scripts, 1)])
    outcomes = [each.said.split()[0] for each in ended]
    for script, outcome in zip(scripts, outcomes):
        assert newest_step(script.folder / "checkpoints") == (2 if outcome == "saved" else 1)
    assert outcomes[0] == "failed"
    assert outcomes[-1] == "saved"
    assert outcomes.index("saved") >= 3


# --- Power cut ---------------------------------------------------------------------------------


def after_power_cut(tmp_path: Path, job: Callable[[Path], None]) -> int:
    """The newest step on an ext4 disk whose power went right after `job` returned.

    What the disk had been given by then is the image file; what the kernel still held is not.
    """
    image, cut = tmp_path / "disk.img", tmp_path / "cut.img"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk:
        job(disk)
        shutil.copyfile(image, cut)
    with mounted(tmp_path / "again", "-o", "loop", str(cut)) as disk:
        return newest_step(disk / "out" / "run" / "checkpoints")


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4")
def test_a_saved_checkpoint_survives_a_power_cut(tmp_path):
    def save(disk: Path) -> None:
        for step in (1, 2, 3):
            commit(disk / "out" / "run" / "checkpoints", step, size=100_000)

    assert after_power_cut(tmp_path, save) == 3


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="needs mkfs.ext4")
def test_the_power_cut_is_real_without_fsync_the_checkpoint_is_gone(tmp_path, monkeypatch):
    def save(disk: Path) -> None:
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        commit(disk / "out" / "run" / "checkpoints", 1, size=100_000)
        monkeypatch.undo()

    assert after_power_cut(tmp_path, save) == 0
