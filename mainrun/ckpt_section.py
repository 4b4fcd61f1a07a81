"""Checkpoints: an atomic store, and a saver that takes a snapshot and writes it behind the loop.

    store = CheckpointStore("out/run/checkpoints", keep_last=3)
    saver = Saver(store, optimizers, warn=print)
    saver.save(step, capture(models, optimizers), {"epoch": 1, "val_loss": 1.75})
    saver.wait()
    if path := latest_ckpt("out/run/checkpoints"):
        set_rng_state(restore(path, models, optimizers))
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import fcntl
import io
import json
import math
import mmap
import os
import random
import shutil
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any


class ObservabilityError(Exception):
    pass


def _warn_once(message: str) -> None:
    sys.stderr.write(f"observability: {message}\n")


def _write_all(fd: int, data: Any) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


# --- Checkpoints: on disk -------------------------------------------------------------------------


class CheckpointError(ObservabilityError):
    """A checkpoint is missing, damaged, or not of this model."""


class CheckpointStore:
    """Step directories under one directory: `commit` adds one, whole or not at all."""

    def __init__(self, directory: str | Path, *, keep_last: int = 3) -> None:
        self.directory, self.keep_last = Path(directory), max(1, keep_last)
        self.resumed_from: Path | None = None  # never deleted by this run
        _make_dirs(self.directory)
        for left in self.directory.glob(".tmp-*"):  # of killed processes; a live one holds its lock
            with contextlib.suppress(OSError), _locked(left):
                shutil.rmtree(left, ignore_errors=True)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def commit(self, step: int, files: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Write `files` and `state.json` as `step_…`; when this returns, a power cut keeps them.

        A file is bytes, or a tree for torch.save. Raises OSError with nothing left behind and
        every older checkpoint as it was.
        """
        final = self.path(step)
        staging = self._hidden(final)
        staging.mkdir()
        try:
            with _locked(staging):
                sums = {name: _write(staging / name, content) for name, content in files.items()}
                sequence = 1 + max((s["sequence"] for _, s in checkpoints(self.directory) if s),
                                   default=0)  # fmt: skip
                sealed = _seal({**state, "sequence": sequence, "files": sums})
                _write(staging / "state.json", sealed)
                _sync_dir(staging)
                self._remove(final)  # of a history that a resume from further back gave up
                os.rename(staging, final)
                _sync_dir(self.directory)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._retain()
        return final

    def _retain(self) -> None:
        newest_first = [path for path, state in checkpoints(self.directory) if state]
        keep = {*newest_first[: self.keep_last], self.resumed_from, best_ckpt(self.directory)}
        for path in set(newest_first) - keep:
            with contextlib.suppress(OSError):  # the new one is saved all the same
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill in the middle must not leave half a checkpoint under a good name.
        doomed = self._hidden(path)
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    @staticmethod
    def _hidden(path: Path) -> Path:
        return path.with_name(f".tmp-{path.name}-{os.getpid()}-{time.time_ns()}")


def checkpoints(directory: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Each step directory and its state, the latest commit first: a clock can be wrong.

    The state of an unreadable one is empty, and it comes first, for it may be the newest.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in Path(directory).glob("step_[0-9]*"):
        try:
            found.append((path, read_state(path)))
        except (OSError, CheckpointError):
            found.append((path, {}))
    return sorted(found, key=lambda f: (f[1].get("sequence", math.inf), f[0].name), reverse=True)


def latest_ckpt(directory: str | Path, *, warn: Callable[[str], Any] = _warn_once) -> Path | None:
    """The newest checkpoint whose every byte checks; None where none was ever saved.

    A damaged one is set aside as `.corrupt-…` and the next older one is taken. Raises
    CheckpointError when there were checkpoints and not one is good: a run must not silently
    start at step 0 over them.
    """
    directory = Path(directory)
    for path, _ in checkpoints(directory):
        damage = ckpt_damage(path)
        if damage is None:
            return path
        aside = path.with_name(f".corrupt-{path.name}-{time.time_ns()}")
        with contextlib.suppress(OSError):  # a read-only disk, or another process was first
            os.rename(path, aside)
        warn(f"checkpoint {path} is damaged ({damage}); set aside as {aside.name}, "
             "the next older one is taken")  # fmt: skip
    if bad := sorted(p.name for p in directory.glob("*step_[0-9]*") if p.name[:5] != ".tmp-"):
        raise CheckpointError(
            f"no checkpoint in {directory} is whole: {', '.join(bad)}; "
            "restore one from a backup, or delete them to start again at step 0")
    return None


def best_ckpt(directory: str | Path) -> Path | None:
    """The checkpoint with the lowest `val_loss` in its state.json; None where none has one."""
    losses = [(state.get("val_loss"), path) for path, state in checkpoints(directory)]
    known = [(loss, path) for loss, path in losses if isinstance(loss, float) and loss == loss]
    return min(known)[1] if known else None


def is_valid_ckpt(path: str | Path) -> bool:
    """Whether every file has the size and the checksum that were written. Needs no torch."""
    return ckpt_damage(path) is None


def ckpt_damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte checks."""
    path = Path(path)
    try:
        files = read_state(path)["files"]
        with ThreadPoolExecutor() as pool:
            sums = pool.map(_sum_file, [path / name for name in files])
            bad = [name for name, found in zip(files, sums, strict=True) if found != files[name]]
    except (OSError, CheckpointError) as error:
        return str(error)
    return f"{', '.join(bad)} is not what was written" if bad else None


def publish_weights(checkpoint: Path, target: Path) -> None:
    """Put a checkpoint's model.pth at `target` as well, whole or not at all."""
    _make_dirs(target.parent)
    staging = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    staging.unlink(missing_ok=True)
    try:
        os.link(checkpoint / "model.pth", staging)
    except OSError:  # another file system, or one without links
        shutil.copyfile(checkpoint / "model.pth", staging)
    os.replace(staging, target)
    _sync_dir(target.parent)


_SEAL = ',\n "self_crc32": "{:08x}"\n}}\n'  # ends state.json; the sum is of all bytes before it


def _seal(state: Mapping[str, Any]) -> bytes:
    body = json.dumps(state, indent=1, default=str).removesuffix("\n}").encode()
    return body + _SEAL.format(zlib.crc32(body)).encode()


def read_state(path: str | Path) -> dict[str, Any]:
    """state.json of a checkpoint, its own checksum verified. Raises CheckpointError, OSError."""
    data = (Path(path) / "state.json").read_bytes()
    body = data[: -len(_SEAL.format(0))]
    if data != body + _SEAL.format(zlib.crc32(body)).encode():
        raise CheckpointError(f"{path}/state.json is not what was written")
    state: dict[str, Any] = json.loads(data)
    return state


_CHUNK = 4 << 20  # bytes for one checksum or write: each lets go of the GIL for about a millisecond


class _Summed:
    """A file that sums what is written to it.

    CRC-32: with the size it catches every burst of up to 32 flipped bits, and all else but one
    case in 2^32, at twice the speed of SHA-256. What guards against malice is `weights_only`.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self.size, self.crc = fd, 0, 0

    def write(self, data: Any) -> None:
        for at in range(0, len(data), _CHUNK):
            piece = memoryview(data)[at : at + _CHUNK]
            self.crc = zlib.crc32(piece, self.crc)
            self.size += _write_all(self._fd, piece)

    def flush(self) -> None:
        """What torch.save calls at its end; nothing is held back here."""


def _write(path: Path, content: Any) -> dict[str, Any]:
    """Create `path`, durably, and return its entry in state.json."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        out = _Summed(fd)
        if isinstance(content, bytes):
            out.write(content)
        else:
            _reserve(fd, sum(size for _, size in set(map(_key, _tensors(content)))))
            _torch().save(content, out)
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"size": out.size, "crc32": f"{out.crc:08x}"}


def _reserve(fd: int, size: int) -> None:
    """A full disk says so at once, before it is filled to the last byte for everyone."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:  # many a file system or system cannot: no harm
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise


def _sum_file(path: Path) -> dict[str, Any]:
    size = crc = 0
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            size += count
    return {"size": size, "crc32": f"{crc:08x}"}


def _sync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_dirs(path: Path) -> None:
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for created in missing:  # or a power cut takes the whole new tree, however synced its files
        _sync_dir(created.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that dies with its process. Raises BlockingIOError where another one lives."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks: a save matters more
            pass
        yield
    finally:
        os.close(handle)


# --- Checkpoints: what they hold ------------------------------------------------------------------


def capture(
    models: Sequence[Any], optimizers: Sequence[Any] = (), schedulers: Sequence[Any] = (),
    scalers: Sequence[Any] = (), **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What to save, by file name, still referring to the live tensors. `more` joins the RNG file.

    One model is its plain `state_dict()`; several are a dict with the keys "0", "1", ….
    """
    weights = {str(index): model.state_dict() for index, model in enumerate(models)}
    rest = {
        "optimizer": [optimizer.state_dict() for optimizer in optimizers],
        "scheduler": [scheduler.state_dict() for scheduler in schedulers],
        "scaler": [_scaler_state(scaler) for scaler in scalers],
    }
    return {
        "model.pth": weights["0"] if len(models) == 1 else weights,
        "optimizer.pt": rest,
        "rng_state.pt": {**rng_state(), **more},
    }


def restore(
    path: str | Path, models: Sequence[Any], optimizers: Sequence[Any] = (),
    schedulers: Sequence[Any] = (), scalers: Sequence[Any] = (),
) -> dict[str, Any]:  # fmt: skip
    """Load a checkpoint into the given objects; return what rng_state.pt holds, not yet set.

    Raises CheckpointError that lists the names, before anything is changed, for another model.
    """
    weights = load_file(path, "model.pth", mmap=True)  # load_state_dict copies out of the file
    weights = [weights] if len(models) == 1 else list(weights.values())
    rest = load_file(path, "optimizer.pt")  # not mapped: optimizers keep the tensors they are given
    rng: dict[str, Any] = load_file(path, "rng_state.pt")
    pairs = [(models, weights), (optimizers, rest["optimizer"]),
             (schedulers, rest["scheduler"]), (scalers, rest["scaler"])]  # fmt: skip
    if [len(things) for things, _ in pairs] != [len(states) for _, states in pairs]:
        raise CheckpointError(
            f"{path} has {[len(states) for _, states in pairs]} models, optimizers, schedulers and "
            f"scalers, watch() was given {[len(things) for things, _ in pairs]}; watch the same")
    for model, state in zip(models, weights, strict=True):
        _check_names(model.state_dict(), state, path)
    for things, states in pairs:
        for thing, state in zip(things, states, strict=True):
            thing.load_state_dict(state)
    return rng


def load_file(path: str | Path, name: str, *, mmap: bool = False) -> Any:
    """One file of a checkpoint on the CPU. Data only: a pickle that would run code is refused."""
    file = Path(path) / name
    try:
        return _load(file, mmap)
    except Exception as error:  # unpickling raises whatever the bytes make it raise
        raise CheckpointError(f"cannot load {file}: {error}") from error


def _load(file: Any, mmap: bool = False) -> Any:
    torch = _torch()
    with torch.serialization.safe_globals(_numpy_types()):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _check_loads(tree: Any) -> None:
    """Raise now what a resume would raise, by way of the tree without its tensors' bytes."""
    torch = _torch()
    file = io.BytesIO()
    torch.save(_map(tree, lambda tensor: torch.empty(0)), file)
    file.seek(0)
    _load(file)


def _numpy_types() -> list[Any]:
    """What pickled numbers and arrays of numpy are made of: a learning rate is often one."""
    if (numpy := sys.modules.get("numpy")) is None:
        return []
    makers = [numpy.float64(0).__reduce__()[0], numpy.zeros(0).__reduce__()[0]]
    kinds = {type(numpy.dtype(code)) for code in "?bhilqBHILQefdgFD"}
    return [*makers, *kinds, numpy.dtype, numpy.ndarray]


def _check_names(own: Mapping[str, Any], saved: Mapping[str, Any], path: str | Path) -> None:
    shapes = [{name: tuple(getattr(value, "shape", ())) for name, value in tree.items()}
              for tree in (saved, own)]  # fmt: skip
    there, here = shapes
    both = sorted(there.keys() & here.keys())
    wrong = {
        "missing": sorted(here.keys() - there.keys()),
        "unexpected": sorted(there.keys() - here.keys()),
        "mis-shaped (saved, here)":
            [f"{n} {there[n]}, {here[n]}" for n in both if there[n] != here[n]],
    }  # fmt: skip
    found = [f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"{path} is of a different model; {'; '.join(found)}")


def rng_state() -> dict[str, Any]:
    """Every generator a loop draws from, in types that `weights_only` loads. Draws nothing."""
    torch = _torch()
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    if torch.cuda.is_initialized():  # the host's record of seed and offset: no wait for the device
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    torch = _torch()
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        numpy.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _scaler_state(scaler: Any) -> dict[str, Any]:
    """GradScaler.state_dict() without its two `.item()`, each of which waits for the device."""
    scale, tracker = getattr(scaler, "_scale", None), getattr(scaler, "_growth_tracker", None)
    if scale is None or tracker is None or not scale.is_cuda:
        return dict(scaler.state_dict())
    return {
        "scale": scale, "_growth_tracker": tracker,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
    }  # fmt: skip


# --- Checkpoints: saving behind the loop ----------------------------------------------------------


class Saver:
    """Takes a snapshot in the loop and writes it behind the loop's back, one at a time.

    Nothing here raises into the loop: a failed save goes to `warn`, and older ones stay.
    """

    def __init__(
        self, store: CheckpointStore, optimizers: Sequence[Any] = (), *,
        warn: Callable[[str], Any] = _warn_once,
        on_saved: Callable[[Path], None] = lambda path: None,
    ) -> None:  # fmt: skip
        self.store, self._optimizers, self._warn, self._on_saved = store, optimizers, warn, on_saved
        self.skipped = self.failed = 0  # skipped: came while another one was being written
        self._arena: _Arena | None = None
        self._thread: threading.Thread | None = None
        self._last_step: int | None = None
        self._checked = False
        for optimizer in optimizers:
            getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._hold_step)

    def prepare(self, parts: Mapping[str, Any]) -> None:
        """Reserve the memory for this state in the background: up to seconds for 4 GB on a GPU."""
        if not self.busy():
            tensors = _snapshot(parts)[1]
            self._start(lambda: self._fit(tensors), "cannot reserve memory for checkpoints")

    def save(
        self, step: int, parts: Mapping[str, Any], state: Mapping[str, Any], *, wait: bool = False
    ) -> bool:
        """Snapshot `parts` now, write behind; False when skipped, failed or saved already.

        With `wait` it waits for the save in flight and for its own; without, it is skipped while
        one is in flight.
        """
        if wait:
            self.wait()
        if self.busy():
            self.skipped += 1
            return False
        if step == self._last_step or self.store.path(step) == self.store.resumed_from:
            return False
        complaint = f"step {step} was not saved"
        try:
            snapshot, tensors = _snapshot(parts)
            arena = self._fit(tensors)
            arena.fill()
        except Exception as error:  # a stranger's state, or no memory: the training goes on
            self._arena = None
            self._fail(complaint, error)
            return False
        self._last_step = step
        job = partial(self._write, step, snapshot, arena, {**state, "global_step": step})
        self._start(job, complaint, hurry=wait)
        if wait:
            self.wait()
        return True

    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Until what is in flight is durable or has failed; False when the time ran out."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.busy()

    def _fit(self, tensors: Sequence[Any]) -> _Arena:
        if self._arena is None or not self._arena.fits(tensors):
            self._arena = None  # first, so that the two never exist together
            self._arena = _Arena(tensors, _changed_by_step(self._optimizers))
        return self._arena

    def _hold_step(self, *_: Any) -> None:
        if self._arena is not None:
            self._arena.hold_step()

    def _write(
        self, step: int, snapshot: Mapping[str, Any], arena: _Arena, state: Mapping[str, Any]
    ) -> None:
        files = arena.on_host(snapshot)
        if not self._checked:  # once: what a resume would refuse must not pass for saved
            _check_loads(files)
            self._checked = True
        self._on_saved(self.store.commit(step, files, state))

    def _start(self, job: Callable[[], Any], complaint: str, *, hurry: bool = False) -> None:
        def run() -> None:
            if not hurry and sys.platform == "linux":  # where niceness is a thread's own
                # The writer takes what time the loop leaves.
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            try:
                job()
            except Exception as error:  # disk, memory, a stranger's state: never the training's
                self._fail(complaint, error)

        # A daemon: a disk that hangs must not hold up the end of the script; `wait` is for that.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _fail(self, complaint: str, error: Exception) -> None:
        self.failed += 1
        self._last_step = None
        self._warn(f"{complaint}: {error}; earlier checkpoints in {self.store.directory} "
                   "are untouched, the training goes on")  # fmt: skip


_Key = tuple[int, int]  # of a storage: address, bytes
_Copies = tuple[list[Any], list[Any]]  # to, of


class _Arena:
    """Host memory with a place for each storage of a state, and the copies that fill it.

    Storages, not tensors: so tied weights stay tied, and every view, stride and 0-d number comes
    back as it was. Where a CUDA device has room, its state is first copied there (a millisecond
    for gigabytes) and leaves in one transfer beside the next steps; where it has none, each storage
    leaves on its own, and the optimizer's next step waits for them on the device.
    """

    def __init__(self, tensors: Sequence[Any], late: set[_Key]) -> None:
        self._known = {t.data_ptr() for t in tensors}
        self._on_host: list[tuple[int, int, int]] = []  # to, of, bytes
        self._now: list[_Copies] = []  # in the order of the loop's own stream
        self._behind: list[tuple[Any, list[_Copies]]] = []  # on a stream of their own
        self._arrivals: list[Any] = []  # CUDA events
        self._pending: list[Any] = []  # those that the optimizer's next step has to wait for
        self.overlaps = False
        # These storages stay alive with us, so an address cannot come to mean another tensor.
        storages = {_key(t): t.untyped_storage() for t in tensors}
        groups: dict[Any, dict[_Key, Any]] = {}
        for key, storage in storages.items():
            groups.setdefault(storage.device, {})[key] = storage
        keys = [key for group in groups.values() for key in group]
        sizes = [-(-size // 64) * 64 for _, size in keys]
        starts = accumulate(sizes, initial=0)
        self._offsets = dict(zip(keys, starts, strict=False))
        self.memory = _host_memory(sum(sizes))
        for device, group in groups.items():
            if device.type == "cuda":
                self._plan_cuda(device, group, late)
            else:
                self._on_host += self._pieces(group)

    def fits(self, tensors: Sequence[Any]) -> bool:
        return {t.data_ptr() for t in tensors} == self._known

    def fill(self) -> None:
        """Copy the state as it is now, in the order of the loop's streams. Never waits for one."""
        torch = _torch()
        _copy_memory(self._on_host, torch.get_num_threads())
        for to, of in self._now:
            torch._foreach_copy_(to, of, non_blocking=True)
        arrivals = []
        for side, copies in self._behind:
            loop = torch.cuda.current_stream(side.device)
            arrivals.append(loop.record_event())
            side.wait_stream(loop)
            with torch.cuda.stream(side):
                for to, of in copies:
                    torch._foreach_copy_(to, of, non_blocking=True)
                arrivals.append(side.record_event())
        self._arrivals = arrivals
        self._pending = list(arrivals) if self.overlaps else []

    def hold_step(self) -> None:
        """Let the device, not the host, wait before the state changes under a copy."""
        pending, self._pending = self._pending, []
        for event in pending:
            _torch().cuda.current_stream(event.device).wait_event(event)

    def on_host(self, snapshot: Any) -> Any:
        """The snapshot with the copies in its tensors' places, once they have all arrived."""
        torch = _torch()
        while not all(event.query() for event in self._arrivals):
            time.sleep(0.001)  # polled, as a waiting thread would hold the GIL
        memory = self.memory.untyped_storage()
        # Each on a storage of its own: torch.save writes storages whole.
        own = {key: memory[at : at + key[1]] for key, at in self._offsets.items()}

        def copy_of(t: Any) -> Any:
            if t.data_ptr() not in self._known:
                return t.cpu()
            like = torch.empty(0, dtype=t.dtype)
            return like.set_(own[_key(t)], t.storage_offset(), t.shape, t.stride())

        return _map(snapshot, copy_of)

    def _plan_cuda(self, device: Any, storages: Mapping[_Key, Any], late: set[_Key]) -> None:
        torch = _torch()
        self._pin()
        first = min(self._offsets[key] for key in storages)
        size = max(self._offsets[key] + key[1] for key in storages) - first
        side = torch.cuda.Stream(device)
        free, total = torch.cuda.mem_get_info(device)
        if free - size > total // 10:  # what is left must do for the largest step still to come
            staging = torch.empty(size, dtype=torch.uint8, device=device)
            self._now += self._copies(storages, staging, first)
            self._behind.append((side, [([self.memory[first : first + size]], [staging])]))
            return
        # Parameters and their statistics rest until the next step; buffers and batches do not.
        self.overlaps = True
        early = {key: storage for key, storage in storages.items() if key not in late}
        rest = {key: storage for key, storage in storages.items() if key in late}
        self._now += self._copies(early, self.memory, 0)
        self._behind.append((side, self._copies(rest, self.memory, 0)))

    def _pin(self) -> None:
        """Page-lock the memory in place: `pin_memory` would round its size up to a power of two."""
        cuda, address = _torch().cuda.cudart(), self.memory.data_ptr()
        # Where the limit on locked memory refuses, the copies still work, only slower.
        if int(cuda.cudaHostRegister(address, self.memory.numel(), 1)) == 0:
            weakref.finalize(self, cuda.cudaHostUnregister, address).atexit = False

    def _pieces(self, storages: Iterable[_Key]) -> Iterator[tuple[int, int, int]]:
        for of, size in storages:
            to = self.memory.data_ptr() + self._offsets[of, size]
            for at in range(0, size, _CHUNK):
                yield to + at, of + at, min(_CHUNK, size - at)

    def _copies(self, storages: Mapping[_Key, Any], base: Any, shift: int) -> list[_Copies]:
        """Pairs of equal lists, one call each. As integers: no bit of a NaN changes on the way."""
        torch = _torch()
        groups: dict[Any, _Copies] = {}
        for key, storage in storages.items():
            at = self._offsets[key] - shift
            word = torch.uint8 if key[1] % 8 or key[0] % 8 else torch.int64
            of = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            to_all, of_all = groups.setdefault(word, ([], []))
            to_all.append(base[at : at + key[1]].view(word))
            of_all.append(of.view(word))
        return list(groups.values())


def _host_memory(size: int) -> Any:
    """Bytes of memory that is already resident, so that the first save takes no page faults."""
    block = mmap.mmap(-1, max(size, 8), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # DONTFORK: a data loader's worker would make every page of it copy-on-write.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(OSError, AttributeError):
            block.madvise(getattr(mmap, advice))
    memory = _torch().frombuffer(block, dtype=_torch().uint8)
    ctypes.memset(memory.data_ptr(), 0, size)  # lets go of the GIL
    return memory


def _copy_memory(pieces: Sequence[tuple[int, int, int]], workers: int) -> None:
    """memcpy by a few threads, which meet once: where cores are busy, torch's own threads would
    wait for each other at every tensor (a fifth of the speed with two busy cores)."""
    work = iter(pieces)

    def run() -> None:
        for to, of, count in work:
            ctypes.memmove(to, of, count)

    total = sum(count for _, _, count in pieces)
    helpers = [threading.Thread(target=run) for _ in range(min(workers, total >> 24, 8) - 1)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()


def _snapshot(parts: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """A copy of the parts, and those tensors in it that are still the live ones.

    Live are models and optimizers, which an arena copies as a whole; what is new at every save
    (RNG states, carried batches) or of an unusual kind is copied here and now.
    """
    torch = _torch()
    plain, live = {torch.Tensor, torch.nn.Parameter}, []

    def take(t: Any) -> Any:
        if type(t) not in plain or t.layout is not torch.strided or not (t.is_cuda or t.is_cpu):
            return t.detach().cpu().clone()  # may wait, and is rare
        if not t.numel():
            return t.detach()
        live.append(t)
        return t

    small = _map(parts.get("rng_state.pt"), lambda t: t.detach().clone())
    big = {name: _map(part, take) for name, part in parts.items() if name != "rng_state.pt"}
    return big if small is None else {**big, "rng_state.pt": small}, live


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of the tree, with its tensors changed and nothing shared that could change later."""
    kind = type(tree)
    if kind is dict:
        return {key: _map(value, change) for key, value in tree.items()}
    if kind is list or kind is tuple:
        return kind(_map(item, change) for item in tree)
    if kind in (int, float, bool, str, bytes, type(None)):
        return tree
    if isinstance(tree, _torch().Tensor):
        return change(tree)
    twin = copy.copy(tree) if isinstance(tree, dict) else copy.deepcopy(tree)
    if isinstance(tree, dict):  # keeps its kind, and the `_metadata` of a state_dict
        twin.update((key, _map(value, change)) for key, value in tree.items())
    return twin


def _tensors(tree: Any) -> list[Any]:
    found: list[Any] = []
    _map(tree, found.append)
    return found


def _changed_by_step(optimizers: Sequence[Any]) -> set[_Key]:
    """The storages that nothing but an optimizer's step changes."""
    groups = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    states = [dict(optimizer.state) for optimizer in optimizers]
    return {_key(tensor) for tensor in _tensors([groups, [list(s.values()) for s in states]])}


def _key(tensor: Any) -> _Key:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _torch() -> Any:
    """Imported by what needs it: the commands that only read a run do without."""
    import torch

    return torch
