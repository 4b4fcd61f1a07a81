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
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import after_power_cut, mounted
from faults.campaign import FILES, Campaign, newest_step
from faults.scripts import AUTO, SAVING, TRAINING, Script, of_runs, on_a_bad_disk, origin, refused
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
    state = {kind: [] for kind in obs.KINDS} | {"model": [model], "optimizer": [optimizer]}
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
    campaign.run(2)
    campaign.run(1, in_a_row=6, epochs=6)
    assert campaign.failures == []
    assert campaign.kills >= 8
    assert campaign.torn or campaign.resumes


# --- Disks that fill and fail ------------------------------------------------------------------


def saver_at(directory: Path) -> tuple[obs.Saver, Callable[[int], bool]]:
    saver = obs.Saver(obs.CheckpointStore(directory, keep_last=5))
    state = {kind: [] for kind in obs.KINDS} | {"model": [nn.Linear(500, 500)]}
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


@needs_gcc
def test_a_signal_while_a_write_is_in_flight_loses_no_step(tmp_path):
    """Each save takes a second here, and a step a millisecond."""
    signalled = TRAINING.replace(
        "    run.settle()\n", "    if step == 9: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    script = Script(tmp_path / "work", signalled)
    slow = {"DISK_PATH": ".tmp-step", "DISK_CALL": "fsync", "DISK_MS": 150}
    [stopped] = on_a_bad_disk([(script, {**AUTO, **slow, "NAME": "run", "STEPS": 99})])
    assert stopped.code == -signal.SIGTERM
    assert len(stopped.lines("loss")) == 10  # the signal came after the ninth
    saved = {path.name for path in script.out.glob("run/checkpoints/step_*")}
    assert "step_00000010" in saved
    assert len(saved) < 5  # most came while another was being written
    assert origin(twin(script, "twin").run(**AUTO, NAME="run")) == "10"


@pytest.mark.parametrize("made", ["a file", "a link to nowhere"])
def test_a_signal_ends_the_script_also_where_nothing_can_be_saved(tmp_path, made):
    signalled = TRAINING.replace(
        'print("from", step)\n',
        "path = run.dir / 'checkpoints'\n"
        + ("path.touch()\n" if made == "a file" else "path.symlink_to('/nowhere/at/all')\n"),
    ).replace("    run.settle()\n", "    if step == 4: os.kill(os.getpid(), signal.SIGTERM)\n")
    script = Script(tmp_path / "work", signalled)
    stopped = script.run(-signal.SIGTERM, **{**SAVING, "SAVE_INTERVAL": 9}, NAME="run")
    assert stopped.said.count("from ") == 0
    assert len(stopped.lines("loss")) in (4, 5)
    assert "failed and the training goes on" in stopped.said


# --- Power cut ---------------------------------------------------------------------------------


def newest_after_power_cut(tmp_path: Path, job: Callable[[Path], None]) -> int:
    """The newest step on a disk whose power went right after `job` returned."""

    def job_and_cut(disk: Path, cut: Callable[[], None]) -> None:
        job(disk)
        cut()

    with after_power_cut(tmp_path, job_and_cut) as disk:
        return newest_step(disk / "out" / "run" / "checkpoints")


def test_a_saved_checkpoint_survives_a_power_cut(tmp_path):
    def save(disk: Path) -> None:
        for step in (1, 2, 3):
            commit(disk / "out" / "run" / "checkpoints", step, size=100_000)

    assert newest_after_power_cut(tmp_path, save) == 3


def test_the_power_cut_is_real_without_fsync_the_checkpoint_is_gone(tmp_path, monkeypatch):
    def save(disk: Path) -> None:
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        commit(disk / "out" / "run" / "checkpoints", 1, size=100_000)
        monkeypatch.undo()

    assert newest_after_power_cut(tmp_path, save) == 0


# --- A wanted resume that cannot be ---------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Script:
    """A run that has failed after its third step, with three checkpoints."""
    broken = TRAINING.replace("os.kill(os.getpid(), 9)", "raise SystemExit(3)")
    Script(tmp_path / "work", broken).run(3, **AUTO, NAME="run", KILL_AT=3)
    return Script(tmp_path / "work", TRAINING)


def twin(script: Script, name: str, source: str = TRAINING) -> Script:
    folder = script.folder.with_name(name)
    shutil.copytree(script.folder, folder, symlinks=True)
    return Script(folder, source)


@needs_gcc
def test_what_cannot_be_read_is_an_error_of_resume_and_nothing_is_renamed(stopped):
    """No permission, a failing disk, a file server that has forgotten the file."""
    newest = "run/checkpoints/step_00000003/"
    files = [newest + name for name in (*FILES[:3], "state.json")]
    files += ["run/config.json", "run/run_manifest.json", "run/results.json"]
    orders = [
        {"DISK_PATH": file, "DISK_CALL": call, "DISK_ERRNO": number}
        for file in files
        for call, number in (("open", errno.EACCES), ("read", errno.EIO), ("read", errno.ESTALE))
    ]
    for folder in ("out", "out/run/checkpoints"):
        path = stopped.folder.with_name("twin") / folder
        orders.append({"DISK_PATH": path, "DISK_CALL": "opendir", "DISK_ERRNO": errno.EACCES})
    script = twin(stopped, "twin")
    before = of_runs(script.out)
    ended = on_a_bad_disk([(script, {**AUTO, **each, "NAME": "run"}) for each in orders])
    for order, each in zip(orders, ended):
        said = refused(each)
        assert os.strerror(order["DISK_ERRNO"]) in said
        assert str(order["DISK_PATH"]) in said
    assert of_runs(script.out) == before
    assert origin(script.run(**AUTO, NAME="run")) == "3"


LIMITS = {
    "memory": """
        import resource
        memory = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (memory + (1 << 20), resource.RLIM_INFINITY))
    """,
    "threads": "import threading; threading.stack_size(1 << 46)  # there is no room for a thread",
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_machine_that_lacks_what_a_resume_takes_is_an_error_not_a_beginning(stopped, what):
    limits = textwrap.dedent(LIMITS[what])
    limited = TRAINING.replace("step = obs.resume(", f"{limits}\nstep = obs.resume(")
    script = twin(stopped, "twin", limited)
    before = of_runs(script.out)
    refused(script.run(1, **AUTO, NAME="run"))
    assert of_runs(script.out) == before


def sealed(body: bytes) -> bytes:
    return body + f',\n "self_crc32": "{zlib.crc32(body):08x}"\n}}\n'.encode()


def test_a_state_that_is_sealed_but_no_json_is_damage_like_another(stopped):
    state = stopped.out / "run/checkpoints/step_00000003/state.json"
    for number, body in enumerate((b"no json", b'{"a": [}', b'["a"', b'{"a": "\xff"')):
        script = twin(stopped, f"twin{number}")
        (script.folder / state.relative_to(stopped.folder)).write_bytes(sealed(body))
        ended = script.run(**AUTO, NAME="run")
        assert origin(ended) == "2"
        assert "step_00000003 is damaged" in ended.said


@pytest.mark.parametrize("content", [b"", b'{"status": "comple', b"\0" * 300])
def test_a_torn_results_file_is_not_the_end_of_a_run(stopped, content):
    (stopped.out / "run/results.json").write_bytes(content)
    assert origin(stopped.run(**AUTO, NAME="run")) == "3"
    assert json.loads((stopped.out / "run/results.json").read_text())["status"] == "completed"


def test_where_every_checkpoint_is_damaged_nothing_begins_anew(stopped):
    for path in stopped.out.glob("run/checkpoints/step_*/model.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # also once they are set aside
        said = refused(stopped.run(1, **AUTO, NAME="run"))
        assert f"no checkpoint in {stopped.out}/run/checkpoints is whole" in said
    assert not list(stopped.out.glob("run-2"))
    shutil.rmtree(stopped.out / "run/checkpoints")  # as the message says
    assert origin(stopped.run(**AUTO, NAME="run")) == "0"


@pytest.mark.parametrize("path", ["run", "run/checkpoints", "run/checkpoints/step_00000003"])
def test_a_damaged_checkpoint_that_is_named_is_an_error_and_is_not_touched(stopped, path):
    weights = stopped.out / "run/checkpoints/step_00000003/model.pth"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = of_runs(stopped.out / "run/checkpoints")
    ended = stopped.run(None, **SAVING, OBS_RESUME=f"out/{path}")
    if path.endswith("3"):
        assert "step_00000003/model.pth is not what was written" in refused(ended)
    else:
        assert origin(ended) == "2"
        assert "step_00000003 is damaged" in ended.said
    if path != "run":
        assert of_runs(stopped.out / "run/checkpoints") == before


# --- Hostile files --------------------------------------------------------------------------------


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(two_steps, tmp_path, name, as_zip):
    marker = tmp_path / "it-ran"
    hostile = tmp_path / "hostile"
    hostile.write_bytes(pickle.dumps(Attack(marker)))
    if as_zip:
        torch.save(Attack(marker), hostile)
        assert zipfile.is_zipfile(hostile)
    good = two_steps.path(1)
    files = {each: (good / each).read_bytes() for each in FILES[:3]}
    path = two_steps.commit(3, {**files, name: hostile.read_bytes()}, dict)  # its digest is right
    assert obs.is_valid_ckpt(path)
    model = nn.Linear(8, 8)
    watched = {kind: [] for kind in obs.KINDS} | {"model": [model]}
    watched["optimizer"] = [torch.optim.AdamW(model.parameters())]
    with pytest.raises(obs.CheckpointError, match=f"cannot load .*{name}"):
        obs.restore(path, watched)
    assert not marker.exists()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_huge(path: Path) -> None:
    os.truncate(path, 1 << 40)


def as_deep(path: Path) -> None:
    path.write_bytes(sealed(b'{"a": ' + b"[" * 100_000))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("made", [as_fifo, as_device, as_folder, as_huge, as_deep])
def test_a_file_that_is_none_is_refused_by_its_name_at_once(stopped, made, name):
    made(stopped.out / "run/checkpoints/step_00000003" / name)
    ended = stopped.run(**AUTO, NAME="run", SECONDS=2)
    assert origin(ended) == "2"
    said = f"step_00000003 is damaged ({stopped.out}/run/checkpoints/step_00000003/{name}"
    assert said in ended.said


@pytest.mark.parametrize("name", ["config.json", "run_manifest.json", "results.json"])
@pytest.mark.parametrize("made", [as_fifo, as_device, as_folder, as_deep])
def test_a_document_that_is_no_file_is_refused_by_its_name_at_once(stopped, made, name):
    made(stopped.out / "run" / name)
    ended = stopped.run(None, **AUTO, NAME="run", SECONDS=2)
    if name == "results.json":  # torn, as it were
        assert origin(ended) == "3"
    else:
        assert f"out/run/{name}" in refused(ended)


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a size": lambda state: state["files"]["model.pth"].update(size=1 << 62),
    "a size that is none": lambda state: state["files"]["model.pth"].update(size="much"),
    "sums without end": lambda state: state["files"]["model.pth"].update(crc32=["0"] * 10**6),
    "sums that are none": lambda state: state["files"]["model.pth"].update(crc32=7),
    "no size": lambda state: state["files"].update({"model.pth": {}}),
    "no files": lambda state: state.update(files={}),
    "files that are none": lambda state: state.update(files=[1, 2]),
    "no weights": lambda state: state["files"].pop("model.pth"),
    "no generators": lambda state: state["files"].pop("rng_state.pt"),
    "a file elsewhere": lambda state: state["files"].update(
        {"../../../../../secret": {"size": 1, "crc32": ["00000000"]}}
    ),
    "a device": lambda state: state["files"].update(
        {"/dev/zero": {"size": 0, "crc32": ["00000000"]}}
    ),
    "no step": lambda state: state.pop("global_step"),
    "a step that is none": lambda state: state.update(global_step="many"),
    "an epoch that is none": lambda state: state.update(step_in_epoch={}),
    "no history": lambda state: state.update(loss_history=None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_state_that_lies_is_never_a_start_at_the_beginning(stopped, lie):
    """Sealed anew, as whoever has the folder can."""
    path = stopped.out / "run/checkpoints/step_00000003/state.json"
    state = json.loads(path.read_text())
    del state["self_crc32"]
    LIES[lie](state)
    path.write_bytes(obs.seal(state))
    ended = stopped.run(None, **AUTO, NAME="run", SECONDS=2)
    if ended.code:
        assert "step_00000003" in refused(ended)
    else:
        assert origin(ended) == "2"
        assert "step_00000003 is damaged" in ended.said


def test_generators_that_are_a_pipe_are_not_waited_for_though_no_state_names_them(stopped):
    step = stopped.out / "run/checkpoints/step_00000003"
    state = json.loads((step / "state.json").read_text())
    del state["self_crc32"], state["files"]["rng_state.pt"]
    (step / "state.json").write_bytes(obs.seal(state))
    as_fifo(step / "rng_state.pt")
    ended = stopped.run(None, **AUTO, NAME="run", SECONDS=2)
    assert "step_00000003" in (refused(ended) if ended.code else ended.said)


def test_a_sealed_state_of_any_content_reads_back(tmp_path):
    state = {"text": 'a "quoted"\n}\n,', "list": [1, {"self_crc32": "00000000"}], "none": None}
    path = obs.CheckpointStore(tmp_path).commit(1, {}, lambda: state)
    assert {key: obs.read_state(path)[key] for key in state} == state
    assert json.loads((path / "state.json").read_text())["sequence"] == 1
