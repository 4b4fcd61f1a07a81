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


def commit(directory: Path, step: int, size: int = 5000) -> Path:
    """A checkpoint of plain bytes, with a store of its own as a new process would have."""
    store = obs.CheckpointStore(directory, keep_last=2)
    content = bytes([step % 251]) * size + f"step {step}".encode()
    return store.commit(step, dict.fromkeys(FILES[:-1], content), {"step": step})


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


@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_found_and_the_older_one_taken(tmp_path, name):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    store = obs.CheckpointStore(tmp_path)
    saver = obs.Saver(store, [optimizer], warn=pytest.fail)
    for step in (1, 2):
        parts = {**obs.capture([model], [optimizer]), "run_manifest.json": b"{}"}
        saver.save(step, parts, {"epoch": 1}, wait=60)
    original = (store.path(2) / name).read_bytes()
    for damaged in damages(original):
        (store.path(2) / name).write_bytes(damaged)
        said: list[str] = []
        assert obs.latest_ckpt(tmp_path, warn=said.append) == store.path(1)
        assert len(said) == 1
        aside = next(tmp_path.glob(".corrupt-*"))
        (aside / name).write_bytes(original)
        aside.rename(store.path(2))
    (store.path(2) / name).unlink()
    assert obs.latest_ckpt(tmp_path, warn=said.append) == store.path(1)


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


def operations(directory: Path) -> list[str]:
    with failing_at(0, lambda: None, once=True) as seen:
        commit(directory, 3)
    return seen


def test_a_kill_at_any_file_operation_leaves_the_old_or_the_new_one_whole(tmp_path):
    for step in (1, 2):
        commit(tmp_path / "start", step)
    total = len(operations(shutil.copytree(tmp_path / "start", tmp_path / "count")))
    assert total > 30
    found = []
    for count in range(1, total + 1):
        run = shutil.copytree(tmp_path / "start", tmp_path / f"kill{count}")

        def job(run: Path = run, count: int = count) -> None:
            with failing_at(count, lambda: os.kill(os.getpid(), signal.SIGKILL), once=True):
                commit(run, 3)

        assert in_child(job) == -signal.SIGKILL
        found.append(newest_step(run))
        assert commit(run, 4) == run / "step_00000004"
        assert not list(run.glob(".*"))
        assert newest_step(run) == 4
    assert set(found) == {2, 3}
    assert found == sorted(found)


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_an_error_at_any_file_operation_leaves_the_older_ones_alone(tmp_path, number, once):
    for step in (1, 2):
        commit(tmp_path / "start", step)
    total = len(operations(shutil.copytree(tmp_path / "start", tmp_path / "count")))

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    for count in range(1, total + 1):
        run = shutil.copytree(tmp_path / "start", tmp_path / f"fail{count}")
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
    campaign.run(4)
    campaign.run(1, in_a_row=3)
    assert campaign.failures == []
    assert campaign.kills >= 7
    assert campaign.torn


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


def saver_at(directory: Path) -> tuple[obs.Saver, list[str], dict[str, object]]:
    said: list[str] = []
    saver = obs.Saver(obs.CheckpointStore(directory, keep_last=5), warn=said.append)
    return saver, said, obs.capture([nn.Linear(500, 500)])


def test_a_disk_that_fills_up_costs_the_save_and_nothing_else(tmp_path):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=3500k", "tmpfs") as disk:
        saver, said, parts = saver_at(disk / "run")
        for step in (1, 2, 3, 4, 5):
            saver.save(step, parts, {}, wait=60)
        assert saver.failed == len(said) == 2
        assert "No space left" in said[0]
        assert newest_step(disk / "run") == 3
        assert not list((disk / "run").glob(".*"))


def test_a_disk_that_turns_read_only_costs_the_save_and_nothing_else(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=9m", "tmpfs") as disk:
        saver, said, parts = saver_at(disk / "run")
        saver.save(1, parts, {}, wait=60)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        saver.save(2, parts, {}, wait=60)
        assert "Read-only" in said[0]
        assert newest_step(disk / "run") == 1
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert saver.save(2, parts, {}, wait=60)
        assert newest_step(disk / "run") == 2


def test_a_limit_on_file_sizes_costs_the_save_and_nothing_else(tmp_path):
    commit(tmp_path, 1)

    def job() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        commit(tmp_path, 2, size=200_000)

    assert in_child(job) == 70
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


EIO_LIBRARY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int due(const char *name) {   /* FAIL_CALL names the call, FAIL_AT counts down to it */
    const char *call = getenv("FAIL_CALL"), *at = getenv("FAIL_AT");
    static int seen;
    return call && at && !strcmp(call, name) && ++seen == atoi(at);
}
ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    if (fd > 2 && due("write")) { errno = EIO; return -1; }
    return real(fd, data, size);
}
int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    if (due("fsync")) { errno = EIO; return -1; }
    return real(fd);
}
"""
EIO_SCRIPT = """
import os, sys
import observability as obs
store = obs.CheckpointStore(sys.argv[1])
os.environ["FAIL_CALL"], os.environ["FAIL_AT"] = sys.argv[2:4]
files = dict.fromkeys(("model.pth", "optimizer.pt"), b"new" * 9999)
try:
    store.commit(2, files, {})
except OSError as error:
    print("failed", error.errno)
else:
    print("saved")
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_error_of_the_disk_itself_is_no_saved_checkpoint(tmp_path, call):
    library, source, run = tmp_path / "eio.so", tmp_path / "eio.c", tmp_path / "run"
    source.write_text(EIO_LIBRARY)
    flags = ["-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(["gcc", *flags], check=True)
    commit(run, 1)
    path = os.pathsep.join([str(Path(obs.__file__).parent)])
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path}
    outcomes = []
    for count in range(1, 9):
        command = [sys.executable, "-c", EIO_SCRIPT, str(run), call, str(count)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        outcomes.append(done.stdout.strip())
        assert newest_step(run) == 2 if outcomes[-1] == "saved" else newest_step(run) in (1, 2)
        shutil.rmtree(run / "step_00000002", ignore_errors=True)
    assert outcomes[0] == f"failed {errno.EIO}"
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


# --- Hostile files -----------------------------------------------------------------------------


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, name, as_zip):
    marker = tmp_path / "it-ran"
    hostile = tmp_path / "hostile"
    hostile.write_bytes(pickle.dumps(Attack(marker)))
    if as_zip:
        torch.save(Attack(marker), hostile)
        assert zipfile.is_zipfile(hostile)
    model = nn.Linear(2, 2)
    store = obs.CheckpointStore(tmp_path / "run")
    files = {**obs.capture([model]), name: hostile.read_bytes()}  # its digest is right
    path = store.commit(1, files, {})
    assert obs.is_valid_ckpt(path)
    with pytest.raises(obs.CheckpointError, match=f"cannot load .*{name}"):
        obs.restore(path, [model])
    assert not marker.exists()


def test_a_sealed_state_of_any_content_reads_back(tmp_path):
    state = {"text": 'a "quoted"\n}\n,', "list": [1, {"self_crc32": "00000000"}], "none": None}
    path = obs.CheckpointStore(tmp_path).commit(1, {}, state)
    assert {key: obs.read_state(path)[key] for key in state} == state
    assert json.loads((path / "state.json").read_text())["sequence"] == 1
