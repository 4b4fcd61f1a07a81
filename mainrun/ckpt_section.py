"""Checkpoints: an atomic store, and a saver that takes a snapshot and writes it behind the loop.

    store = CheckpointStore("out/run/checkpoints", keep_last=3)
    saver = Saver(store, optimizers, warn=print)
    saver.prepare(parts)                    # once the optimizer has its state: reserves the memory
    saver.save(step, capture(models, optimizers), {"epoch": 1, "val_loss": 1.75})
    saver.wait()
    path = latest_ckpt("out/run/checkpoints")
    if path is not None:
        set_rng_state(restore(path, models, optimizers))

A step directory is whole or absent: it is written under a hidden name, synced, and renamed.
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
import re
import shutil
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Warn = Callable[[str], None]

_CHUNK = 4 << 20  # bytes for one checksum or write: each lets go of the GIL for about a millisecond
_STEP_DIR = re.compile(r"step_(\d{8,})")
_SEAL = ',\n "self_crc32": "{:08x}"\n}}\n'  # ends state.json; the sum is of all bytes before it


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, or not of this model."""


def _torch() -> Any:
    """Imported by what needs it: the commands that only read a run do without."""
    import torch

    return torch


# --- Store -----------------------------------------------------------------------------------


class CheckpointStore:
    """Step directories under one directory: `commit` adds one, whole or not at all."""

    def __init__(self, directory: str | Path, *, keep_last: int = 3) -> None:
        self.directory = Path(directory)
        self.keep_last = max(1, keep_last)
        self.resumed_from: Path | None = None  # never deleted by this run
        _make_dirs(self.directory)
        self._sweep()

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def commit(
        self,
        step: int,
        files: Mapping[str, Callable[[Any], Any]],
        state: Mapping[str, Any],
        *,
        reserve: Mapping[str, int] | None = None,
    ) -> Path:
        """Write `files` and `state.json` as `step_…`; when this returns, a power cut keeps them.

        `reserve` names the bytes to expect for a file, so that a full disk refuses it at once.
        Raises OSError with nothing left behind and every older checkpoint as it was.
        """
        final = self.path(step)
        staging = self.directory / f".tmp-{final.name}-{os.getpid()}-{time.time_ns()}"
        staging.mkdir()
        try:
            with _locked(staging):
                sums = {n: _write(staging / n, w, (reserve or {}).get(n)) for n, w in files.items()}
                sealed = _seal({**state, "sequence": self._next_sequence(), "files": sums})
                _write(staging / "state.json", lambda out: out.write(sealed))
                _sync_dir(staging)
                self._remove(final)  # of a history that a resume from further back gave up
                os.rename(staging, final)
                _sync_dir(self.directory)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._retain()
        return final

    def _next_sequence(self) -> int:
        return 1 + int(max(map(_sequence, self._readable()), default=0))

    def _readable(self) -> list[Path]:
        return [path for path in _step_dirs(self.directory) if _sequence(path) < math.inf]

    def _retain(self) -> None:
        newest_first = self._readable()
        keep = {*newest_first[: self.keep_last], self.resumed_from, best_ckpt(self.directory)}
        for path in newest_first:
            if path not in keep:
                with contextlib.suppress(OSError):  # the new one is saved all the same
                    self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill in the middle must not leave half a checkpoint under a good name.
        doomed = path.with_name(f".tmp-delete-{path.name}-{os.getpid()}-{time.time_ns()}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed processes left; a live one holds the lock of its directory."""
        for left in self.directory.glob(".tmp-*"):
            with contextlib.suppress(OSError), _locked(left):
                shutil.rmtree(left, ignore_errors=True)


def latest_ckpt(directory: str | Path, *, warn: Warn = warnings.warn) -> Path | None:
    """The newest checkpoint whose every byte checks; None where none was ever saved.

    A damaged one is set aside as `.corrupt-…` and the next older one is taken. Raises
    CheckpointError when there were checkpoints and not one is good: a run must not silently
    start at step 0 over them.
    """
    directory = Path(directory)
    for path in _step_dirs(directory):
        damage = ckpt_damage(path)
        if damage is None:
            return path
        aside = path.with_name(f".corrupt-{path.name}-{time.time_ns()}")
        with contextlib.suppress(OSError):  # a read-only disk, or another process was first
            os.rename(path, aside)
        warn(f"checkpoint {path} is damaged ({damage}); set aside as {aside.name}, "
             "the next older one is taken")  # fmt: skip
    if bad := [p.name for p in (*_step_dirs(directory), *directory.glob(".corrupt-step_*"))]:
        raise CheckpointError(
            f"no checkpoint in {directory} is whole: {', '.join(sorted(bad))}; "
            "restore one from a backup, or delete them to start again at step 0")
    return None


def best_ckpt(directory: str | Path) -> Path | None:
    """The checkpoint with the lowest `val_loss` in its state.json; None where none has one."""
    losses = [(_state_or_empty(path).get("val_loss"), path) for path in _step_dirs(Path(directory))]
    known = [(loss, path) for loss, path in losses if isinstance(loss, float) and loss == loss]
    return min(known)[1] if known else None


def is_valid_ckpt(path: str | Path) -> bool:
    """Whether every file has the size and the checksum that were written. Needs no torch."""
    return ckpt_damage(path) is None


def publish_weights(checkpoint: Path, target: str | Path) -> None:
    """Put a checkpoint's model.pth at `target` as well, whole or not at all, without a copy."""
    target = Path(target)
    _make_dirs(target.parent)
    staging = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    staging.unlink(missing_ok=True)
    try:
        os.link(checkpoint / "model.pth", staging)
    except OSError:  # another file system, or one without links
        _write(staging, lambda out: out.write((checkpoint / "model.pth").read_bytes()))
    os.replace(staging, target)
    _sync_dir(target.parent)


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


def read_state(path: str | Path) -> dict[str, Any]:
    """state.json of a checkpoint, its own checksum verified. Raises CheckpointError, OSError."""
    data = (Path(path) / "state.json").read_bytes()
    body = data[: -len(_SEAL.format(0))]
    if data != body + _SEAL.format(zlib.crc32(body)).encode():
        raise CheckpointError(f"{path}/state.json is not what was written")
    state: dict[str, Any] = json.loads(data)
    return state


def _seal(state: Mapping[str, Any]) -> bytes:
    body = json.dumps(state, indent=1, default=str).removesuffix("\n}").encode()
    return body + _SEAL.format(zlib.crc32(body)).encode()


def _state_or_empty(path: Path) -> dict[str, Any]:
    try:
        return read_state(path)
    except (OSError, CheckpointError):
        return {}


def _sequence(path: Path) -> float:
    """The number of its commit; infinite for an unreadable one: it may be the newest."""
    return float(_state_or_empty(path).get("sequence", math.inf))


def _step_dirs(directory: Path) -> list[Path]:
    """Newest first, in the order of their commits: a clock can be wrong, a step can be redone."""
    found = [path for path in directory.glob("step_*") if _STEP_DIR.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_sequence(path), path.name), reverse=True)


class _SummedFile(io.RawIOBase):
    """A new file that sums what passes through it.

    CRC-32: with the size it catches every burst of up to 32 flipped bits, and all else but one
    case in 2^32, at twice the speed of SHA-256. It guards against accident; what guards against
    malice is `weights_only`.
    """

    def __init__(self, path: Path, reserve: int | None) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.size = self.crc = 0
        if reserve and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, reserve)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    self.close()
                    raise

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = memoryview(data)[:_CHUNK]
        written = os.write(self._fd, piece)
        self.crc = zlib.crc32(piece[:written], self.crc)
        self.size += written
        return written

    def sync(self) -> None:
        os.ftruncate(self._fd, self.size)  # what was reserved and not used
        os.fsync(self._fd)

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # the file system cannot, no harm


def _write(path: Path, fill: Callable[[Any], Any], reserve: int | None = None) -> Any:
    """Create `path`, let `fill` write it, and return its entry in state.json once it is synced."""
    raw = _SummedFile(path, reserve)
    with io.BufferedWriter(raw, 1 << 20) as out:  # torch.save writes five scraps for each tensor
        fill(out)
        out.flush()
        raw.sync()
    return {"size": raw.size, "crc32": f"{raw.crc:08x}"}


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
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise  # any other: a file system without locks, where a save matters more
        yield
    finally:
        os.close(handle)


# --- What a checkpoint holds -------------------------------------------------------------------


def capture(
    models: Sequence[Any],
    optimizers: Sequence[Any] = (),
    schedulers: Sequence[Any] = (),
    scalers: Sequence[Any] = (),
    loaders: Sequence[Any] = (),
    **more: Any,
) -> dict[str, Any]:
    """What to save, by file name, still referring to the live tensors. `more` joins the RNG file.

    One model is its plain `state_dict()`; several are a dict with the keys "0", "1", ….
    """
    weights: Any = [model.state_dict() for model in models]
    one = {"optimizer": [o.state_dict() for o in optimizers]}
    for name, things in {"scheduler": schedulers, "loader": loaders}.items():
        one[name] = [t.state_dict() for t in things if hasattr(t, "state_dict")]
    one["scaler"] = [_scaler_state(scaler) for scaler in scalers]
    return {
        "model.pth": weights[0] if len(models) == 1 else {str(i): w for i, w in enumerate(weights)},
        "optimizer.pt": one,
        "rng_state.pt": {**rng_state(), **more},
    }


def restore(
    path: str | Path,
    models: Sequence[Any],
    optimizers: Sequence[Any] = (),
    schedulers: Sequence[Any] = (),
    scalers: Sequence[Any] = (),
    loaders: Sequence[Any] = (),
) -> dict[str, Any]:
    """Load a checkpoint into the given objects; return what rng_state.pt holds, not yet set.

    Raises CheckpointError that lists the names, before anything is changed, for another model.
    """
    weights = load_file(path, "model.pth", mmap=True)  # load_state_dict copies out of the file
    weights = [weights] if len(models) == 1 else [weights[str(i)] for i in range(len(models))]
    for model, state in zip(models, weights, strict=True):
        _check_names(model.state_dict(), state, path)
    rest = load_file(path, "optimizer.pt")  # not mapped: optimizers keep the tensors they are given
    for model, state in zip(models, weights, strict=True):
        model.load_state_dict(state)
    kinds = {"optimizer": optimizers, "scheduler": schedulers, "scaler": scalers, "loader": loaders}
    for kind, things in kinds.items():
        for thing, state in zip(things, rest[kind], strict=False):
            thing.load_state_dict(state)
    rng: dict[str, Any] = load_file(path, "rng_state.pt")
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
    """Raise now what a resume would raise: the tree goes out and in, without its tensors' bytes."""
    torch = _torch()
    twin, tensors = _split(tree)
    file = io.BytesIO()
    torch.save(_join(twin, tensors, [torch.empty(0)] * len(tensors)), file)
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
    def shape(value: Any) -> tuple[int, ...]:
        return tuple(getattr(value, "shape", ()))

    both = own.keys() & saved.keys()
    wrong = {
        "missing": own.keys() - saved.keys(),
        "unexpected": saved.keys() - own.keys(),
        "mis-shaped (saved, here)": {
            f"{n} {shape(saved[n])}, {shape(own[n])}"
            for n in both
            if shape(saved[n]) != shape(own[n])
        },
    }
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in wrong.items() if names]
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


# --- Saver -------------------------------------------------------------------------------------


class Saver:
    """Takes a snapshot in the loop and writes it behind the loop's back, one at a time.

    Nothing here raises into the loop: a failed save goes to `warn`, and older ones stay.
    """

    def __init__(
        self,
        store: CheckpointStore,
        optimizers: Sequence[Any] = (),
        *,
        warn: Warn = warnings.warn,
        on_saved: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.store, self._optimizers, self._warn, self._on_saved = store, optimizers, warn, on_saved
        self.skipped = self.failed = 0  # skipped: came while another one was being written
        self._memory: _HostMemory | None = None
        self._arena: _Arena | None = None
        self._hooked = False
        self._thread: threading.Thread | None = None
        self._last_step: int | None = None
        self._checked = False

    def prepare(self, parts: Mapping[str, Any]) -> None:
        """Reserve the memory for this state in the background: up to seconds for 4 GB on a GPU."""
        if not self.busy():
            _, tensors = _split(parts)
            self._start(lambda: self._fit(tensors), "cannot reserve memory for checkpoints")

    def save(
        self, step: int, parts: Mapping[str, Any], state: Mapping[str, Any], *,
        also: Mapping[str, bytes] | None = None, wait: bool = False,
    ) -> bool:  # fmt: skip
        """Snapshot `parts` now, write behind; False when skipped, failed or saved already.

        `also` are small files to lie beside (run_manifest.json). With `wait` it waits for the
        save in flight and for its own; without, it is skipped while one is in flight.
        """
        if wait:
            self.wait()
        if self.busy():
            self.skipped += 1
            return False
        if step == self._last_step or self.store.path(step) == self.store.resumed_from:
            return False
        try:
            twins, tensors = _split(parts)
            arena = self._fit(tensors)
            placed = arena.fill(tensors)
        except Exception as error:  # a stranger's state, or no memory: the training goes on
            self._arena = None
            self._fail(f"step {step} was not saved", error)
            return False
        self._last_step = step
        state = {**state, "global_step": step}
        whole = partial(self._collect, arena, twins, tensors, placed)
        job = partial(self._write, step, whole, state, also or {})
        self._start(job, f"step {step} was not saved", hurry=wait)
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

    def _fit(self, tensors: Sequence[Tensor]) -> _Arena:
        if self._arena is None or not self._arena.fits(tensors):
            self._arena = None
            self._arena = _Arena(tensors, _changed_by_step(self._optimizers), self._reserve)
            if self._arena.overlaps and not self._hooked:
                self._hooked = True
                for optimizer in self._optimizers:
                    optimizer.register_step_pre_hook(self._hold_step)
        return self._arena

    def _reserve(self, size: int) -> _HostMemory:
        if self._memory is None or self._memory.size < size:
            self._memory = None  # first, so that the two never exist together
            self._memory = _HostMemory(size)
        return self._memory

    def _hold_step(self, *_: Any) -> None:
        if self._arena is not None:
            self._arena.hold_step()

    def _collect(
        self, arena: _Arena, twins: Any, tensors: Sequence[Tensor], placed: Sequence[Tensor]
    ) -> dict[str, Any]:
        arena.wait()
        whole: dict[str, Any] = _join(twins, tensors, arena.host_tensors(placed))
        if not self._checked:  # once: what a resume would refuse must not pass for saved
            _check_loads(whole)
            self._checked = True
        return whole

    def _write(
        self, step: int, collect: Callable[[], dict[str, Any]], state: Mapping[str, Any],
        also: Mapping[str, bytes],
    ) -> None:  # fmt: skip
        trees, save = collect(), _torch().save
        files = {name: partial(save, tree) for name, tree in trees.items()}
        small = {name: lambda out, data=data: out.write(data) for name, data in also.items()}
        reserve = {name: _bytes_of(tree) for name, tree in trees.items()}
        self._on_saved(self.store.commit(step, {**files, **small}, state, reserve=reserve))

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


class _Arena:
    """Host memory with a place for each storage of a state, and the copies that fill it.

    Storages, not tensors: so tied weights stay tied, and every view, stride and 0-d number comes
    back as it was. Where a CUDA device has room, its state is first copied there (a millisecond
    for gigabytes) and leaves in one transfer beside the next steps; where it has none, each storage
    leaves on its own, and the optimizer's next step waits for them on the device.
    """

    def __init__(
        self, tensors: Sequence[Tensor], late: set[_Key], reserve: Callable[[int], _HostMemory]
    ) -> None:
        self.overlaps = False  # whether the optimizer has to wait for copies
        self._known = {t.data_ptr() for t in tensors} - {0}
        self._on_host: list[tuple[int, int, int]] = []  # to, of, bytes
        self._now: list[_Copies] = []  # in the order of the loop's own stream
        self._behind: list[tuple[Any, list[_Copies]]] = []  # on a stream of their own
        self._arrivals: list[Any] = []  # CUDA events
        self._pending: list[Any] = []  # those that the optimizer has yet to wait for
        # These storages stay alive with us, so an address cannot come to mean another tensor.
        storages = {_key(t): t.untyped_storage() for t in tensors}
        by_device: dict[Any, dict[_Key, Any]] = {}
        for key, storage in storages.items():
            by_device.setdefault(storage.device, {})[key] = storage
        self._offsets: dict[_Key, int] = {}
        end = 0
        for key in (key for group in by_device.values() for key in group):
            self._offsets[key] = end
            end += -(-key[1] // 64) * 64
        self._host = reserve(end)
        for device, group in by_device.items():
            if device.type == "cuda":
                self._plan_cuda(device, group, late)
            else:
                self._on_host += self._pieces(group)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all but a little has a place: RNG states and batches are new at each save."""
        strays = (t for t in tensors if t.data_ptr() not in self._known)
        return 10 * sum(t.numel() * t.element_size() for t in strays) <= self._host.size + _CHUNK

    def fill(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copy the state as it is now, in the order of the loop's streams. Never waits for one.

        Returns the tensors with what has no place here replaced by a clone.
        """
        torch = _torch()
        known = self._known
        placed = [t if t.data_ptr() in known else t.detach().clone() for t in tensors]
        _copy_memory(self._on_host, torch.get_num_threads())
        for to, of in self._now:
            torch._foreach_copy_(to, of, non_blocking=True)
        devices = {t.device for t in placed if t.is_cuda}
        self._arrivals = [torch.cuda.current_stream(d).record_event() for d in devices]
        for side, copies in self._behind:
            side.wait_stream(torch.cuda.current_stream(side.device))
            with torch.cuda.stream(side):
                for to, of in copies:
                    torch._foreach_copy_(to, of, non_blocking=True)
                self._arrivals.append(side.record_event())
        self._pending = list(self._arrivals)
        return placed

    def wait(self) -> None:
        """Until all has arrived in host memory: polled, as a waiting thread would hold the GIL."""
        while not all(event.query() for event in self._arrivals):
            time.sleep(0.001)

    def host_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The copies of `tensors`, on storages of their own: torch.save writes storages whole."""
        torch = _torch()
        memory = self._host.bytes.untyped_storage()
        own = {key: memory[at : at + key[1]] for key, at in self._offsets.items()}

        def copy_of(t: Any) -> Any:
            if t.data_ptr() not in self._known:
                return t.cpu()
            like = torch.empty(0, dtype=t.dtype)
            return like.set_(own[_key(t)], t.storage_offset(), t.shape, t.stride())

        return [copy_of(t) for t in tensors]

    def hold_step(self) -> None:
        """Let the device, not the host, wait before the state changes under a copy."""
        torch = _torch()
        pending, self._pending = self._pending, []
        for event in pending:
            torch.cuda.current_stream(event.device).wait_event(event)

    def _plan_cuda(self, device: Any, storages: Mapping[_Key, Any], late: set[_Key]) -> None:
        torch = _torch()
        self._host.pin()
        first = min(self._offsets[key] for key in storages)
        size = max(self._offsets[key] + key[1] for key in storages) - first
        side = torch.cuda.Stream(device)
        free, total = torch.cuda.mem_get_info(device)
        if free - size > total // 10:  # what is left must do for the largest step still to come
            staging = torch.empty(size, dtype=torch.uint8, device=device)
            self._now += self._copies(storages, staging, first)
            self._behind.append((side, [([self._host.bytes[first : first + size]], [staging])]))
            return
        # Parameters and their statistics rest until the next step; buffers and batches do not.
        early = {key: storage for key, storage in storages.items() if key not in late}
        rest = {key: storage for key, storage in storages.items() if key in late}
        self._now += self._copies(early, self._host.bytes, 0)
        self._behind.append((side, self._copies(rest, self._host.bytes, 0)))
        self.overlaps = True

    def _pieces(self, storages: Mapping[_Key, Any]) -> Iterator[tuple[int, int, int]]:
        for of, size in storages:
            to = self._host.bytes.data_ptr() + self._offsets[of, size]
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


_Key = tuple[int, int]  # of a storage: address, bytes
_Copies = tuple[list[Any], list[Any]]  # to, of


def _key(tensor: Tensor) -> _Key:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class _HostMemory:
    """A block of resident memory, on request page-locked in place (`pin_memory` would round the
    size up to a power of two)."""

    def __init__(self, size: int) -> None:
        torch = _torch()
        block = mmap.mmap(-1, max(size, 8), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # DONTFORK: a data loader's worker would make every page of it copy-on-write.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with contextlib.suppress(OSError, AttributeError):
                block.madvise(getattr(mmap, advice))
        self.size, self._pinned = size, False
        self.bytes: Tensor = torch.frombuffer(block, dtype=torch.uint8)
        ctypes.memset(self.bytes.data_ptr(), 0, size)  # takes the page faults, without the GIL

    def pin(self) -> None:
        cuda, address = _torch().cuda.cudart(), self.bytes.data_ptr()
        # Where the limit on locked memory refuses, the copies still work, only slower.
        if not self._pinned and int(cuda.cudaHostRegister(address, self.size, 1)) == 0:
            self._pinned = True
            weakref.finalize(self, cuda.cudaHostUnregister, address).atexit = False


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


def _changed_by_step(optimizers: Sequence[Any]) -> set[_Key]:
    """The storages that nothing but an optimizer's step changes."""
    torch = _torch()
    of_groups = (p for o in optimizers for group in o.param_groups for p in group["params"])
    of_state = (v for o in optimizers for state in o.state.values() for v in state.values())
    return {_key(t) for t in (*of_groups, *of_state) if isinstance(t, torch.Tensor)}


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of the tree, with its tensors changed and nothing shared that could change later."""
    kind = type(tree)
    if kind is dict:
        return {key: _map(value, change) for key, value in tree.items()}
    if kind is list or kind is tuple:
        return kind(_map(item, change) for item in tree)
    if kind in _FIXED:
        return tree
    if isinstance(tree, _torch().Tensor):
        return change(tree)
    if isinstance(tree, dict):
        twin = copy.copy(tree)  # keeps the kind, and the `_metadata` of a state_dict
        for key, value in tree.items():
            twin[key] = _map(value, change)
        return twin
    return copy.deepcopy(tree)


_FIXED = {int, float, bool, str, bytes, type(None)}


def _split(tree: Any) -> tuple[Any, list[Tensor]]:
    """A copy of the tree that still holds the live tensors, and a list of those."""
    torch = _torch()
    tensors: list[Any] = []
    plain, strided = {torch.Tensor, torch.nn.Parameter}, torch.strided

    def take(tensor: Any) -> Any:
        if type(tensor) in plain and tensor.layout is strided and (tensor.is_cuda or tensor.is_cpu):
            tensors.append(tensor)
            return tensor
        return tensor.detach().cpu().clone()  # sparse, another device: may wait, and is rare

    return _map(tree, take), tensors


def _join(tree: Any, tensors: Sequence[Tensor], host: Sequence[Tensor]) -> Any:
    """The tree with its `tensors` replaced by their copies."""
    copies = {id(t): c for t, c in zip(tensors, host, strict=True)}
    return _map(tree, lambda t: copies.get(id(t), t))


def _bytes_of(tree: Any) -> int:
    """About what torch.save will write for a tree, rather more than less."""
    _, tensors = _split(tree)
    return sum(dict(map(_key, tensors)).values()) + 1024 * len(tensors) + 65536
