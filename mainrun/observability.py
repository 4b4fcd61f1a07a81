"""Watch a PyTorch training run without changing it.

Copy this file beside train.py and add a few lines:

    import observability as obs

    obs.init(config=vars(args))
    obs.watch(model, optimizer=opt, scheduler=scheduler)
    ...
        obs.validation(val_loss)                         # after each evaluation
        obs.step(step, loss=loss, tokens=xb.numel())     # last line of each optimizer step
    obs.finish()

What a run leaves behind, beside the script:

    logs/tb/run_2026-11-22T05-00-00/     TensorBoard events
    out/<run name>/
        metrics.ndjson                   every record, a line each; everything else follows from it
        config.json  run_manifest.json   what was run, on what
        training.log  results.json       evaluations and events; how it ended

    python observability.py summarize|parity|rebuild|tb --help

What it promises: it draws no random number, reads no batch, runs no forward, sets no flag and never
waits for the device; a full disk ends the metrics, not the training; a SIGKILL loses no step.
It needs the standard library, and torch only where the training already has it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import math
import mmap
import operator
import os
import platform
import re
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

try:
    import fcntl
except ImportError:  # Windows, where a live run is then not told from a dead one
    fcntl = None  # type: ignore[assignment]

__all__ = ["ObservabilityError", "Run", "finish", "init", "log", "read_run", "skip_epoch", "step",
           "validation", "watch"]  # fmt: skip

SCHEMA = 1
SHARD_BYTES = 64 << 20  # of the journal
TOLERANCE, TOLERANCE_LAST = 5e-4, 1e-4  # nats: how far the reference curve moves between devices

P = ParamSpec("P")
R = TypeVar("R")


class ObservabilityError(Exception):
    """Base of every error this module raises on purpose; none is raised into the training."""


class RunError(ObservabilityError):
    """A run directory is missing, unreadable, or of a newer schema than this file knows."""


class LogError(ObservabilityError):
    """A log is missing, is not JSON lines, or holds no validation loss."""


def _warn_once(message: str, said: set[str] = set()) -> None:  # noqa: B006, it is the memory
    if message not in said:
        said.add(message)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed
            sys.stderr.write(f"observability: {message}\n")


def _fenced(method: Callable[P, R]) -> Callable[P, R | None]:
    """A call that cannot raise into the training loop, whatever it is handed."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # strangers' objects, the disk, and our own mistakes
            _warn_once(f"{method.__name__}() failed and the training goes on: {error!r}")
            return None

    return call


# --- The run --------------------------------------------------------------------------------------


class Run:
    """One training run; the module's functions are its methods, on the run that `init` opened.

    Args:
        run_name: directory under `out_dir`; by default a timestamp and the commit.
        config: hyperparameters: a dict, dataclass or Namespace. Secrets are redacted.
        out_dir, tb_dir: relative paths start at the script's folder.
        enabled: False, or `OBS_DISABLE=1`, makes every call do nothing.
        settings: the fields of `Settings`.
    """

    def __init__(
        self, run_name: str | None = None, *, config: object = None, out_dir: str | Path = "out",
        tb_dir: str | Path = "logs/tb", enabled: bool = True, **settings: Any,
    ) -> None:
        self.settings = Settings.resolve(settings)
        self.name = run_name or ""
        self.dir: Path | None = None
        self.global_step = 0
        self.epoch: int | None = None
        self.best: tuple[float, int] | None = None  # the lowest validation loss, and its step
        self.degraded: dict[str, str] = {}  # what broke, and how
        self._started = time.time()
        self._lrs: dict[str, Any] = {}
        self._stepped = False  # an optimizer has stepped since the last call of step()
        self._mark: float | None = None  # perf_counter() when the current iteration began
        self._tokens = 0
        self._epoch_began = (0.0, 0)  # perf_counter(), tokens
        self._epoch_loss: Any = None
        self._last: dict[str, float] = {}
        self._forms: dict[tuple[str, ...], _Form] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._seq = self._drained = self._dropped = 0
        self._stuck_at = -1  # how far the sinks were when the ring was last found full for long
        self._lock = threading.RLock()  # reentrant, for a signal handler that calls in
        self._drain_lock, self._landing = threading.Lock(), threading.Lock()
        self._sinks: list[Sink] = []
        self._rank = int(os.environ.get("RANK") or 0)
        disabled = os.environ.get("OBS_DISABLE", "0") not in ("", "0") or self._rank > 0
        self._hooks: list[Any] = []
        self._wake, self._stopping = threading.Event(), False
        self._open = False
        if enabled and not disabled:
            self._open = bool(self._start(_plain(config), Path(out_dir), Path(tb_dir)))

    @_fenced
    def _start(self, config: Any, out_dir: Path, tb_dir: Path) -> bool:
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(self._started))
        commit = git_commit()
        tb_run = script_dir() / tb_dir / f"{self.name or 'run'}_{stamp}"
        self.name = self.name or "_".join(filter(None, (stamp, (commit or "")[:7])))
        self._manifest = {**manifest(commit), "hyperparameters": config}
        try:
            self.dir = _new_dir(script_dir() / out_dir, self.name)
            self.name = self.dir.name
            self._ring = Ring(self.dir / "metrics.ring")
        except OSError as error:
            self._degrade("the run directory", error)
            self._ring = Ring(None)
        if run_dir := self.dir:
            self._add_sink("journal", lambda: Journal(run_dir))
            self._add_sink("training.log", lambda: TrainingLog(run_dir))
            tb_path = os.path.relpath(tb_run, run_dir)
            header = {"schema": SCHEMA, "run": self.name, "created": self._started}
            self._save_json("config.json", {**header, "tb_dir": tb_path, "config": config})
            self._save_json("run_manifest.json", self._manifest)
        if self.settings.tensorboard:
            self._add_sink("TensorBoard", lambda: TensorBoard(tb_run))
        if self.settings.wandb:
            self._add_sink("W&B", lambda: WeightsAndBiases(self.name, config, self.dir))
        self._event("start", run=self.name)
        self._timer = threading.Thread(target=self._keep_draining, daemon=True)
        self._timer.start()
        atexit.register(self._at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        return True

    def _forget(self) -> None:
        """In a forked worker: the run is its parent's, and so is the lock that says it lives."""
        if self._open:
            self._open = False
            self._ring.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("completed" if kind is None else f"failed: {kind.__name__}")

    # What the script calls.

    @_fenced
    def watch(
        self, /, *models: Any, optimizer: Any = None, scheduler: Any = None, scaler: Any = None,
        loader: Any = None,
    ) -> None:
        """Name what is trained; each argument is one object or a sequence of them. Read only."""
        if not self._ready("watch"):
            return
        for index, each in enumerate(_several(optimizer)):
            self._follow_lr("lr" if index == 0 else f"lr/{index}", each)
        for model in models:
            count = sum(parameter.numel() for parameter in model.parameters())
            self._event("watch", model=type(model).__name__, parameters=count)
        self._mark = time.perf_counter()

    def _follow_lr(self, name: str, optimizer: Any) -> None:
        def note(optimizer: Any, *_: object) -> None:
            self._stepped = True
            self._lrs[name] = optimizer.param_groups[0]["lr"]  # of this step, not of the next

        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside a wrapper
        if hasattr(optimizer, "register_step_post_hook"):
            self._hooks.append(optimizer.register_step_post_hook(note))
        else:
            _warn_once(f"{name} is not recorded, {type(optimizer).__name__} takes no step hook")

    def step(
        self, /, step: int | None = None, *, loss: Any = None, tokens: Any = None,
        samples: Any = None, carry: Mapping[str, Any] | None = None, **metrics: Any,
    ) -> None:
        """Record one optimizer step; the last line of an iteration that made one.

        Args:
            step: its number; without it the run counts.
            loss: a number or a one-element tensor; a CUDA tensor is not waited for.
            tokens, samples: how many this step consumed, for the rates per second.
            carry: the loop-carried locals that a resumed run needs.
            metrics: further numbers or one-element tensors.
        """
        if not self._open:
            self._ready("step")
            return
        try:
            now = time.perf_counter()
            if step is None:
                step = self.global_step + 1
            elif step < self.global_step:
                _warn_once(f"step {step} came after step {self.global_step}; both are recorded")
            record = {} if loss is None else {"loss/train": loss}
            record.update(self._lrs)
            if tokens is not None:
                self._tokens += tokens
            if self._mark is not None and now > self._mark:
                if tokens is not None:
                    record["speed/tokens_per_sec_step"] = tokens / (now - self._mark)
                if samples is not None:
                    record["speed/samples_per_sec_step"] = samples / (now - self._mark)
            record.update(metrics)
            self.global_step, self._stepped, self._mark = step, False, now
            self._record("train", step, record)
        except Exception as error:  # whatever the caller handed in: the training goes on
            _warn_once(f"step() failed and the training goes on: {error!r}")

    @_fenced
    def validation(
        self, /, loss: Any, *, step: int | None = None, epoch: int | None = None, **metrics: Any
    ) -> None:
        """Record one evaluation, at the step under way or just made unless another is given."""
        if not self._ready("validation"):
            return
        if epoch is not None and epoch != self.epoch:
            self._begin_epoch(epoch)
        # Part of this iteration's time went into the evaluation: the step's own is not known.
        self._mark = None
        # A copy: the script may go on adding to its tensor.
        self._epoch_loss = loss.detach().clone() if hasattr(loss, "detach") else loss
        record = {"loss/val_step": loss} | {f"{name}/val": v for name, v in metrics.items()}
        if step is None:  # in mid-iteration the optimizer has stepped and step() is yet to come
            step = self.global_step + self._stepped
        self._record("eval", step, record)

    @_fenced
    def log(self, /, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record anything else, any time: numbers or one-element tensors by name."""
        if self._ready("log"):
            self._record("train", self.global_step if step is None else step, metrics)

    @_fenced
    def skip_epoch(self, /, epoch: int | None = None) -> bool:
        """First line of an epoch's loop: `if obs.skip_epoch(epoch): continue`. Names the epoch."""
        if self._ready("skip_epoch"):
            self._begin_epoch(epoch if epoch is not None else (self.epoch or 0) + 1)
            self._mark = time.perf_counter()
        return False

    def finish(self, /, status: str = "completed", **results: Any) -> None:
        """Write out what is left, results.json too, and close; a second call does nothing."""
        if self._open:
            self._finish(status, results)

    def _ready(self, call: str) -> bool:
        if not self._open and self.dir is not None:
            _warn_once(f"{call}() after finish(): it is not recorded")
        return self._open

    def _begin_epoch(self, epoch: int) -> None:
        self._end_epoch()
        self.epoch = epoch
        self._epoch_began = (time.perf_counter(), self._tokens)

    def _end_epoch(self) -> None:
        """One point per epoch: its last validation loss, and its speed with everything in it."""
        record: dict[str, Any] = {}
        began, tokens = self._epoch_began
        if self._epoch_loss is not None:
            record["loss/val"] = self._epoch_loss
        if began and self._tokens > tokens:
            record["speed/tokens_per_sec"] = (self._tokens - tokens) / (time.perf_counter() - began)
        if record and self.epoch is not None:
            self._record("eval", self.global_step, record, epoch=self.epoch)
        self._epoch_loss = None

    # From a value to the ring.

    def _event(self, event: str, **facts: Any) -> None:
        short = {name: str(value)[:200] for name, value in facts.items()}
        self._record("event", self.global_step, {}, event=event, **short)

    def _record(self, phase: str, step: int, metrics: Mapping[str, Any], **tags: Any) -> None:
        if self._in_flight:
            self._land()
        values = [v if v.__class__ is float else _number(k, v) for k, v in metrics.items()]
        if None in values:
            metrics = {k: v for k, v in zip(metrics, values, strict=True) if v is not None}
            values = [*metrics.values()]
        form = self._form(phase, metrics, tags)
        if form.size > Ring.SLOT:
            self._record_halves(phase, step, dict(zip(metrics, values, strict=True)), tags)
        elif _ONLY_FLOATS.issuperset(map(type, values)):
            self._commit(form, time.time(), step, values)
        else:
            self._in_flight.append(_InFlight(form, time.time(), step, values))

    def _land(self) -> None:
        if self._landing.acquire(blocking=False):  # one thread at a time, to keep their order
            try:
                while self._in_flight and self._in_flight[0].landed():
                    self._commit(*self._in_flight.popleft().unload())
            finally:
                self._landing.release()

    def _form(self, phase: str, metrics: Mapping[str, Any], tags: Mapping[str, Any]) -> _Form:
        key = (phase, *metrics)
        if not tags and (known := self._forms.get(key)):
            return known
        everything = {"phase": phase, "rank": self._rank, **tags}
        form = _Form(json.dumps([everything, *map(str, metrics)]).encode())
        if not tags and len(self._forms) < 1000:  # a script may make up names without end
            self._forms[key] = form
        return form

    def _record_halves(
        self, phase: str, step: int, metrics: Mapping[str, Any], tags: Mapping[str, Any]
    ) -> None:
        names = list(metrics)
        if len(names) < 2:
            return _warn_once(f"{names or tags} is too long a name and is not recorded")
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            self._record(phase, step, {name: metrics[name] for name in half}, **tags)
        return None

    def _commit(self, form: _Form, wall: float, step: int, values: Sequence[float]) -> None:
        """From here on a SIGKILL does not lose the record."""
        # Some slots are spare, for threads that pass here together. Never wait with the lock held.
        if self._seq - self._drained >= Ring.SLOTS - 64 and not self._make_room():
            self._dropped += 1
            return
        with self._lock:
            seq = self._seq + 1
            form.slot.pack_into(
                self._ring.memory, seq % Ring.SLOTS * Ring.SLOT,
                form.size, seq, wall, step, len(form.blob), form.blob, *values, seq,
            )  # fmt: skip
            self._seq = seq

    # From the ring to the sinks.

    def _make_room(self) -> bool:
        """Have a full ring drained; False after a second in vain, as with a sink that hangs."""
        if self._timer is threading.current_thread() or not self._timer.is_alive():
            self.drain()
        self._wake.set()
        patience = time.monotonic() + (0 if self._drained == self._stuck_at else 1)
        while self._seq - self._drained >= Ring.SLOTS - 64:
            if time.monotonic() > patience:
                self._stuck_at = self._drained
                return False
            time.sleep(0.0002)
        return True

    def _keep_draining(self) -> None:
        sample_at = 0.0
        while not self._stopping:
            self._wake.wait(self.settings.drain_interval)
            self._wake.clear()
            try:
                if self.settings.system_interval > 0 and sample_at <= time.monotonic():
                    sample_at = time.monotonic() + self.settings.system_interval
                    self._record("system", self.global_step, system_metrics())
                self._land()
                self.drain()
            except Exception as error:  # a device or a sink: the timer must outlive both
                self._degrade("the timer", error)
        self._close_sinks()

    def drain(self) -> None:
        """Hand what the ring holds to the sinks."""
        with self._drain_lock:
            while self._drained < self._seq:
                # A slice at a time: each write lets the training's thread run.
                upto = min(self._seq, self._drained + 64)
                records = map(self._ring.get, range(self._drained + 1, upto + 1))
                self._write([record for record in records if record is not None])
                self._drained = upto

    def _close_sinks(self) -> None:
        self.drain()
        while self._sinks:
            with contextlib.suppress(Exception):  # a stranger's close; the journal is written
                self._sinks.pop().close()

    def _write(self, records: list[Record]) -> None:
        for record in records:
            if record.form.tags["phase"] in ("train", "eval"):
                self._last.update(zip(record.form.names, record.values, strict=True))
            if record.form.names[:1] == ("loss/val_step",):
                self._note_validation(record.values[0], record.step)
        for sink in list(self._sinks):
            try:
                sink.write(records)
            except Exception as error:  # a full disk, a stranger's package: the others go on
                self._sinks.remove(sink)
                self._degrade(type(sink).__name__, error)

    def _note_validation(self, loss: float, step: int) -> None:
        if math.isfinite(loss) and (self.best is None or loss < self.best[0]):
            self.best = (loss, step)

    def _degrade(self, what: str, error: Exception) -> None:
        if what not in self.degraded:
            self.degraded[what] = repr(error)
            _warn_once(f"{what} is off from step {self.global_step} on: {error}")

    def _add_sink(self, what: str, make: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(make())
        except Exception as error:  # a missing package, an unwritable path: go on without it
            self._degrade(what, error)

    # The end.

    @_fenced
    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)
        self.finish("unfinished" if error is None else f"failed: {error!r}")

    @_fenced
    def _finish(self, status: str, results: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + self.settings.close_timeout
        self._end_epoch()
        while self._in_flight and time.monotonic() < deadline:
            self._land()
            time.sleep(0.001)
        lost = self._dropped + len(self._in_flight)
        self._event("finish", status=status, lost=lost, degraded=", ".join(self.degraded))
        self._open, self._stopping = False, True
        atexit.unregister(self._at_exit)
        for hook in self._hooks:
            hook.remove()
        self._wake.set()
        self._timer.join(max(0.0, deadline - time.monotonic()))
        if not self._timer.is_alive():  # it may have been killed
            self._close_sinks()
        self._save_json("results.json", self._results(status, lost) | _plain(results))
        if self.degraded:
            self._save_json("run_manifest.json", {**self._manifest, "degraded": self.degraded})
            _warn_once(f"at the end of the run these were off: {', '.join(self.degraded)}")
        # What could not be written stays in the ring, for whoever reads the run.
        if self.dir and self._drained == self._seq and "Journal" not in self.degraded:
            (self.dir / "metrics.ring").unlink(missing_ok=True)
        if not self._timer.is_alive():
            self._ring.close()

    def _results(self, status: str, lost: int) -> dict[str, Any]:
        best_loss, best_step = self.best or (None, None)
        facts = {
            "schema": SCHEMA,
            "run": self.name,
            "status": status,
            "steps": self.global_step,
            "wall_s": round(time.time() - self._started, 3),
            "final_train_loss": self._last.get("loss/train"),
            "final_val_loss": self._last.get("loss/val_step"),
            "best_val_loss": best_loss,
            "best_val_step": best_step,
            **{k.removeprefix("system/"): v for k, v in system_metrics().items() if "peak" in k},
            "degraded": self.degraded,
            "lost_records": lost,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _save_json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.dir is not None:
            try:
                _replace_file(self.dir / name, json.dumps(_strict(content), indent=1) + "\n")
            except OSError as error:
                self._degrade(name, error)


@dataclass
class Settings:
    """What `init` takes beside its own arguments.

    An argument goes before its variable, `OBS_` and the name in capitals, and that before the
    default.
    """

    tensorboard: bool = True
    wandb: bool = False  # WANDB_MODE=offline or online turns it on too
    drain_interval: float = 0.5  # seconds between two writes of the journal
    system_interval: float = 10.0  # seconds between two system records, 0 for none
    close_timeout: float = 5.0  # seconds that finish() may take

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> Settings:
        """Bad names and values are said, and the defaults stand."""
        settings = cls(wandb=os.environ.get("WANDB_MODE") in ("offline", "online", "shared"))
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        if unknown := sorted(set(given) - set(kinds)):
            _warn_once(f"init() has no setting {', '.join(unknown)}; it has {', '.join(kinds)}")
        for name, kind in kinds.items():
            value = given.get(name, os.environ.get(f"OBS_{name.upper()}"))
            if kind is bool and isinstance(value, str):
                value = value.lower() not in ("", "0", "false", "no", "off")
            try:
                setattr(settings, name, getattr(settings, name) if value is None else kind(value))
            except (TypeError, ValueError):
                _warn_once(f"setting {name}={value!r} is no {kind.__name__}; the default stands")
        return settings


# --- Facade ---------------------------------------------------------------------------------------

_run: Run | None = None


@functools.wraps(Run, updated=())
def init(*args: Any, **kwargs: Any) -> Run:
    """Open a run for the functions below; one that is still open is finished first."""
    global _run
    if _run is not None:
        _run.finish("superseded")
    _run = Run(*args, **kwargs)
    # From now on obs.step is the run's own: handing the arguments on costs 8 us beside a real step.
    globals().update({name: getattr(_run, name) for name in _FORWARDED})
    return _run


def _on_the_run(method: Callable[Concatenate[Run, P], R]) -> Callable[P, R | None]:
    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        if _run is not None:
            return method(_run, *args, **kwargs)
        if method.__name__ != "finish":
            _warn_once(f"{method.__name__}() before init(): it is not recorded")
        return None

    return call


_FORWARDED = ("watch", "step", "validation", "skip_epoch", "log", "finish")
watch = _on_the_run(Run.watch)
step = _on_the_run(Run.step)
validation = _on_the_run(Run.validation)
skip_epoch = _on_the_run(Run.skip_epoch)
log = _on_the_run(Run.log)
finish = _on_the_run(Run.finish)


# --- Records --------------------------------------------------------------------------------------


_ONLY_FLOATS = frozenset([float])
_HEAD = struct.Struct("<IQdqI")  # a slot's size, number, time, step, and the bytes of its form
_TAIL = struct.Struct("<Q")  # its number again


class Record(NamedTuple):
    """One line of the journal."""

    form: _Form
    seq: int
    wall: float
    step: int
    values: Sequence[float]

    def as_dict(self) -> dict[str, Any]:
        metrics = dict(zip(self.form.names, self.values, strict=True))
        return {"schema": SCHEMA, "seq": self.seq, "time": round(self.wall, 6), "step": self.step,
                "metrics": metrics, "tags": self.form.tags}  # fmt: skip

    def line(self) -> str:
        """As strict JSON; the template of its form is four times faster than json.dumps."""
        if math.isfinite(sum(self.values)):
            return self.form.line % (self.seq, self.wall, self.step, *self.values)
        return json.dumps(_strict(self.as_dict())) + "\n"


class _Form:
    """How records of the same tags and names are written, worked out once from the two."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        self.tags, *names = json.loads(blob)
        self.names: tuple[str, ...] = tuple(names)
        # The record's number stands first and last. Fields are stored in their order, so that a
        # record which was being written when the process died has two that differ.
        self.slot = struct.Struct(f"<IQdqI{len(blob)}s{len(names)}dQ")
        self.size = self.slot.size
        metrics = ",".join(json.dumps(n).replace("%", "%%") + ":%r" for n in names)
        tags = json.dumps(self.tags).replace("%", "%%")
        self.line = f'{{"schema":{SCHEMA},"seq":%d,"time":%.6f,"step":%d,'
        self.line += f'"metrics":{{{metrics}}},"tags":{tags}}}\n'

    @functools.cache  # noqa: B019, forms are few and live as long as the run
    def event(self, step_bytes: int) -> _EventForm:
        return _EventForm(self.names, step_bytes)


class Ring:
    """The latest records, in a file's shared memory: the kernel keeps them when we are killed."""

    SLOT = 1024  # bytes of a record: some thirty metrics; a wider record is split
    # Records between two drains. The kernel write-protects the pages at each write-back, and the
    # next store to each may then wait for the disk: few pages, few waits.
    SLOTS = 512

    def __init__(self, path: Path | None) -> None:
        self._fd = -1
        self._forms: dict[bytes, _Form] = {}
        if path is None:  # no place for a file: a plain queue
            self.memory = mmap.mmap(-1, self.SLOT * self.SLOTS)
            return
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # Write every block now: a store to a hole on a full disk is a SIGBUS, not an error.
        _write_all(self._fd, bytes(self.SLOT * self.SLOTS))
        _lock_file(self._fd)  # says that the run is alive
        populate = getattr(mmap, "MAP_POPULATE", 0)  # Linux: no page fault at first touch
        self.memory = mmap.mmap(self._fd, self.SLOT * self.SLOTS, mmap.MAP_SHARED | populate)

    def get(self, seq: int) -> Record | None:
        return _unpack(self.memory, seq % self.SLOTS * self.SLOT, self._forms)

    def close(self) -> None:
        self.memory.close()
        if self._fd >= 0:
            os.close(self._fd)

    @classmethod
    def left_behind(cls, path: Path, after: int) -> list[Record]:
        """The whole records numbered above `after` in a dead or a living run's ring."""
        content = path.read_bytes() if path.exists() else b""
        found = [_unpack(content, at, {}) for at in range(0, len(content), cls.SLOT)]
        whole = [record for record in found if record is not None and record.seq > after]
        return sorted(whole, key=operator.attrgetter("seq"))


def _unpack(memory: Any, at: int, forms: dict[bytes, _Form]) -> Record | None:
    """The record in the slot that begins at `at`; None where there is none, or a torn one."""
    size, seq, wall, step, blob_size = _HEAD.unpack_from(memory, at)
    if not _HEAD.size <= size <= Ring.SLOT or seq != _TAIL.unpack_from(memory, at + size - 8)[0]:
        return None
    blob = bytes(memory[at + _HEAD.size : at + _HEAD.size + blob_size])
    form = forms.get(blob) or forms.setdefault(blob, _Form(blob))
    return Record(form, seq, wall, step, form.slot.unpack_from(memory, at)[6:-1])


class _Landing:
    """A CUDA value on its way into pinned memory, as float32, behind what its stream has to do.

    Allocating a cell or an event for each would cost ten times as much as the copy, which takes
    about 6 us of the host's time.
    """

    _ABSENT = 0x7FC0DEAD  # the bits of a NaN that no computation yields
    # A cell, and its memory as bits and as a float.
    _free: ClassVar[deque[tuple[Any, Any, Any]]] = deque()

    def __init__(self, value: Any) -> None:
        if not self._free:
            self._free.extend(self._allocate(256))
        self._cell = self._free.popleft()
        tensor, bits, _ = self._cell
        bits.value = self._ABSENT
        value = value.detach().float()
        tensor.copy_(value.reshape(()) if value.dim() else value, non_blocking=True)

    @staticmethod
    def _allocate(count: int) -> Iterator[tuple[Any, Any, Any]]:
        for tensor in sys.modules["torch"].empty(count, pin_memory=True).unbind():
            at = tensor.data_ptr()
            yield tensor, ctypes.c_uint32.from_address(at), ctypes.c_float.from_address(at)

    def landed(self) -> bool:
        return bool(self._cell[1].value != self._ABSENT)

    def take(self) -> float:
        self._free.append(self._cell)
        return float(self._cell[2].value)


class _InFlight(NamedTuple):
    """A record with values that have not landed yet."""

    form: _Form
    wall: float
    step: int
    values: list[Any]

    def landed(self) -> bool:
        for value in self.values:  # a plain loop: each step passes here
            if value.__class__ is _Landing and not value.landed():
                return False
        return True

    def unload(self) -> tuple[_Form, float, int, list[float]]:
        values = [v.take() if type(v) is _Landing else v for v in self.values]
        return self.form, self.wall, self.step, values


def _number(name: str, value: Any) -> Any:
    """A float; what a CUDA value will land in; None for what is no number."""
    try:
        if value.__class__ is _Landing:
            return value
        if getattr(value, "is_cuda", False) and value.numel() == 1:
            return _Landing(value)
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        return _warn_once(f"{name} is not recorded, for it is not one number: {error}")


# --- TensorBoard's format -------------------------------------------------------------------------


class _EventForm:
    """Event{wall_time, step, summary{value{tag, simple_value}…}} of protobuf, sizes fixed.

    A CRC is linear: that of an event is that of the same event with its varying bytes zero, XORed
    with what each varying byte adds at its distance from the end. That is some 30 look-ups in
    place of 150 steps, as fast as a vectorised form.
    """

    def __init__(self, names: Sequence[str], step_bytes: int) -> None:
        heads = [b"\x0a" + _varint(len(name)) + name + b"\x15" for name in map(str.encode, names)]
        heads = [b"\x0a" + _varint(len(head) + 4) + head for head in heads]
        summary = b"\x2a" + _varint(sum(len(head) + 4 for head in heads))
        layout = "".join(f"{len(head)}sf" for head in heads)
        self._struct = struct.Struct(f"<cdc{step_bytes}s{len(summary)}s{layout}")
        self._parts: list[Any] = [b"\x09", 0.0, b"\x10", bytes(step_bytes), summary]
        self._parts += [part for head in heads for part in (head, 0.0)]
        blank = self._struct.pack(*self._parts)
        self._length, self._blank_crc = _framed(blank)[:12], _crc(blank)
        double, single = struct.unpack("<df", b"\x01" * 12)
        filled = self._pack(double, b"\x01" * step_bytes, [single] * len(names))
        varying = [at for at in range(len(blank)) if blank[at] != filled[at]]
        self._varying = operator.itemgetter(*varying)
        self._tables = [_crc_table(len(blank) - 1 - at) for at in varying]

    def _pack(self, wall: float, step: bytes, values: Sequence[float]) -> bytes:
        self._parts[1], self._parts[3], self._parts[6::2] = wall, step, values
        return self._struct.pack(*self._parts)

    def encode(self, wall: float, step: bytes, values: Sequence[float]) -> bytes:
        try:
            body = self._pack(wall, step, values)
        except OverflowError:  # beyond float32
            finite = 3.4028235e38
            values = [v if not abs(v) > finite else math.copysign(math.inf, v) for v in values]
            body = self._pack(wall, step, values)
        added = map(operator.getitem, self._tables, self._varying(body))
        crc = functools.reduce(operator.xor, added, self._blank_crc)
        return self._length + body + _masked(crc)


def _framed(body: bytes) -> bytes:
    """TFRecord: the length, its masked CRC32C, the bytes, theirs."""
    length = struct.pack("<Q", len(body))
    return length + _masked(_crc(length)) + body + _masked(_crc(body))


def _masked(crc: int) -> bytes:
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc(data: bytes) -> int:
    """CRC32C (Castagnoli), as TFRecord has it."""
    table, crc = _crc_table(0), 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@functools.cache
def _crc_table(distance: int) -> list[int]:
    """What each value of a byte adds to the CRC at that distance from the end."""
    if distance:
        first = _crc_table(0)
        return [(x >> 8) ^ first[x & 0xFF] for x in _crc_table(distance - 1)]
    table = list(range(256))
    for _ in range(8):
        table = [(x >> 1) ^ (0x82F63B78 if x & 1 else 0) for x in table]
    return table


def _varint(number: int) -> bytes:
    number &= 0xFFFFFFFFFFFFFFFF  # a negative one as protobuf's int64
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


# --- Sinks ----------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes records in their order, off the training's thread; what it raises ends this sink."""

    def write(self, records: Sequence[Record]) -> None: ...
    def close(self) -> None: ...


class Journal:
    """metrics.ndjson, metrics.1.ndjson, …: every record, none deleted."""

    def __init__(self, run_dir: Path) -> None:
        self._dir, self._fd = run_dir, -1
        self._next_shard()

    def write(self, records: Sequence[Record]) -> None:
        if self._size >= SHARD_BYTES:
            self._next_shard()
        self._size += _write_all(self._fd, "".join([r.line() for r in records]).encode())

    def _next_shard(self) -> None:
        self.close()
        number = len(_shards(self._dir))
        self._fd = _append_to(self._dir / _shard_name(number))
        self._size = 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class TensorBoard:
    """An event file, an event a record; it needs neither tensorboard nor protobuf."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{platform.node()}.{os.getpid()}.obs"
        self._fd = _append_to(directory / name)
        _write_all(self._fd, _framed(b"\x09" + struct.pack("<d", now) + b"\x1a\x0dbrain.Event:2"))

    def write(self, records: Sequence[Record]) -> None:
        _write_all(self._fd, b"".join([self._event(r) for r in records if r.values]))

    def _event(self, record: Record) -> bytes:
        # What is said of an epoch is drawn at the epoch.
        step = _varint(record.form.tags.get("epoch", record.step))
        return record.form.event(len(step)).encode(record.wall, step, record.values)

    def close(self) -> None:
        os.close(self._fd)


class WeightsAndBiases:
    """W&B where it is installed; on this machine only with WANDB_MODE=offline."""

    def __init__(self, name: str, config: Mapping[str, Any], run_dir: Path | None) -> None:
        with _generators_untouched():
            import wandb

            self._run = wandb.init(name=name, config=dict(config or {}), dir=run_dir)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if record.values:
                metrics = dict(zip(record.form.names, record.values, strict=True))
                self._run.log({**metrics, "global_step": record.step})

    def close(self) -> None:
        self._run.finish()


class TrainingLog:
    """training.log: evaluations and events as JSON lines, by structlog where it is installed."""

    def __init__(self, run_dir: Path) -> None:
        file = self._file = (run_dir / "training.log").open("a", encoding="utf-8", buffering=1)
        self._say: Callable[..., Any] = lambda **line: print(json.dumps(line), file=file)
        with contextlib.suppress(ImportError):
            import structlog  # a logger of our own: the script's set-up is not touched

            renderer = structlog.processors.JSONRenderer()
            self._say = structlog.wrap_logger(structlog.PrintLogger(file), [renderer]).info

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            tags = dict(record.form.tags)
            if tags.pop("phase") in ("eval", "event"):
                line = {"event": "validation", "time": record.wall, "step": record.step}
                self._say(**_strict({**line, **tags, **record.as_dict()["metrics"]}))

    def close(self) -> None:
        self._file.close()


# --- Facts about the run --------------------------------------------------------------------------

_ENVIRONMENT = re.compile(
    r"PYTHONHASHSEED|CODEX_(AUDIT|DDP)|(CUDA|CUBLAS|NCCL|OMP|MKL|ATEN|TORCH|OBS|WANDB|SLURM)_\w+"
    r"|(LOCAL_)?RANK|WORLD_SIZE|PRESET|TITLES"
)
_SECRET_NAME = re.compile(r"(?i)(token|secret|passw(or)?d|api_?key|credentials?|auth)$")
_SECRET_TEXT = re.compile(r"\b(hf_|sk-|ghp_|AKIA)[\w-]{8,}|(?<=://)[^/@\s]+(?=@)")


def script_dir() -> Path:
    """The folder of the training script; the working directory in a notebook."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(main).resolve().parent if main else Path.cwd()


def git_commit() -> str | None:
    """`GIT_SHA`, else HEAD of the script's repository; None outside git, or after 2 s."""
    import subprocess

    if given := os.environ.get("GIT_SHA"):
        return given
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=script_dir(), timeout=2,
                              capture_output=True, text=True)  # fmt: skip
        return head.stdout.strip() or None
    return None


def manifest(commit: str | None) -> dict[str, Any]:
    """Where the run came from; what cannot be found out is absent."""
    script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    folders = (script_dir(), *script_dir().parents)
    locks = (folder / name for folder in folders for name in ("uv.lock", "uv.lock.json"))
    facts = {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_sha": commit,
        "lock_sha256": next((_sha256(lock) for lock in locks if lock.is_file()), None),
        "env": {k: v for k, v in sorted(os.environ.items()) if _ENVIRONMENT.fullmatch(k)},
        "script": script.name,
        "script_sha256": _sha256(script) if script.is_file() else None,
        "command_line": _redacted(sys.argv),
        **_torch_facts(),
    }
    return {name: _plain(value) for name, value in facts.items() if value is not None}


def _torch_facts() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    cuda = torch.cuda.is_available()
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def system_metrics() -> dict[str, float]:
    """Seconds and bytes of this process, and what torch holds on the device. No sync."""
    facts: dict[str, Any] = {"cpu_seconds": time.process_time()}
    with contextlib.suppress(OSError):  # Linux has it
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        facts["rss_bytes"] = pages * mmap.PAGESIZE
    with contextlib.suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        facts["cuda_allocated_bytes"] = torch.cuda.memory_allocated()
        facts["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return {f"system/{name}": float(value) for name, value in facts.items()}


def _plain(value: Any, name: str = "") -> Any:
    """A configuration of any kind as JSON, its secrets redacted."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif type(value).__name__ in ("Namespace", "SimpleNamespace"):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each, name) for each in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return "<redacted>" if _SECRET_NAME.search(name) else _SECRET_TEXT.sub("<redacted>", str(value))


def _redacted(arguments: Sequence[str]) -> list[str]:
    """`--token x` and `--token=x` without the x."""
    shown: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.rpartition("=")
        shown.append(name + equals + _plain(value, name if equals else previous))
    return shown


# --- Files ----------------------------------------------------------------------------------------


def _new_dir(parent: Path, name: str) -> Path:
    """A directory of that name or of the next free one: a run is never written over."""
    for number in range(1, 10_000):
        path = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            if number > 1:
                _warn_once(f"{parent / name} holds another run; this one is in {path}")
            return path
    raise RunError(f"{parent / name} and 9,999 more of that name exist; remove some of them")


def _append_to(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _write_all(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def _replace_file(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _lock_file(fd: int) -> bool:
    """Whether the file is ours alone now; a lock that ends with the process."""
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinities: they are the strings "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


@contextlib.contextmanager
def _generators_untouched() -> Iterator[None]:
    """Python's and numpy's random state stay, whatever a stranger's package draws."""
    import random

    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


# --- Reading a run --------------------------------------------------------------------------------


def _shard_name(number: int) -> str:
    return f"metrics.{number}.ndjson" if number else "metrics.ndjson"


def _shards(run_dir: Path) -> list[Path]:
    paths: list[Path] = []
    while (path := run_dir / _shard_name(len(paths))).exists():
        paths.append(path)
    return paths


def read_run(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a run in their order, those too that a SIGKILL left in its ring.

    Raises:
        RunError: there is no journal, or it is of a newer schema.
    """
    seq = 0
    for record in _journal(Path(run_dir)):
        seq = record["seq"]
        yield record
    for left in Ring.left_behind(Path(run_dir) / "metrics.ring", seq):
        yield _strict(left.as_dict())


def _journal(run_dir: Path) -> Iterator[dict[str, Any]]:
    shards = _shards(run_dir)
    if not shards:
        raise RunError(f"{run_dir} holds no metrics.ndjson; give the directory of a run")
    for line in (line for shard in shards for line in shard.open("rb")):
        with contextlib.suppress(ValueError):  # a torn line: the ring has the record
            record = json.loads(line)
            if record["schema"] > SCHEMA:
                raise RunError(
                    f"{run_dir} has schema {record['schema']}, this file knows up to {SCHEMA}; "
                    "use the observability.py that wrote it"
                )
            yield record


def repair(run_dir: Path) -> None:
    """Make a killed run's journal whole: cut a torn last line, append what its ring still holds."""
    if alive(run_dir):
        return
    written = max((record["seq"] for record in _journal(run_dir)), default=0)
    last = _shards(run_dir)[-1]
    os.truncate(last, last.read_bytes().rfind(b"\n") + 1)
    left = Ring.left_behind(run_dir / "metrics.ring", written)
    fd = _append_to(last)
    _write_all(fd, "".join([record.line() for record in left]).encode())
    os.close(fd)
    (run_dir / "metrics.ring").unlink(missing_ok=True)


def alive(run_dir: Path) -> bool:
    """Whether a process is still writing this run."""
    try:
        fd = os.open(run_dir / "metrics.ring", os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock_file(fd)
    finally:
        os.close(fd)


def rebuild(run_dir: Path) -> Path:
    """Write the run's TensorBoard events anew from its journal, and return their directory."""
    if alive(run_dir):
        raise RunError(f"{run_dir} is still being written; rebuild it when the run has ended")
    repair(run_dir)
    records = list(read_run(run_dir))
    header = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    directory = Path(run_dir / header["tb_dir"]).resolve()
    for old in directory.glob("events.out.tfevents.*.obs"):
        old.unlink()  # first: the new file may get the name of an old one
    sink = TensorBoard(directory)
    forms: dict[bytes, _Form] = {}
    for record in records:
        blob = json.dumps([record["tags"], *record["metrics"]]).encode()
        form = forms.get(blob) or forms.setdefault(blob, _Form(blob))
        values = [float(value) for value in record["metrics"].values()]
        sink.write([Record(form, record["seq"], record["time"], record["step"], values)])
    sink.close()
    return directory


def summary(run_dir: Path) -> dict[str, Any]:
    """A run in a line: how it ended, its losses, its median speed, its memory."""
    last: dict[str, float] = {}
    best = (math.inf, 0)
    speeds, steps, status, times = [], 0, "", []
    for record in read_run(run_dir):
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        last |= metrics
        steps = max(steps, record["step"])
        times.append(record["time"])
        speeds += [v for k, v in metrics.items() if k == "speed/tokens_per_sec_step"]
        best = min(best, (metrics.get("loss/val_step", math.inf), record["step"]))
        status = record["tags"].get("status", status)
    speed = sorted(speeds)[len(speeds) // 2] if speeds else None
    return {
        "run": run_dir.name,
        "status": status or ("running" if alive(run_dir) else "killed"),
        "steps": steps,
        "train_loss": last.get("loss/train"),
        "val_loss": last.get("loss/val_step"),
        "best_val_loss": best[0] if best[0] < math.inf else None,
        "best_step": best[1] if best[0] < math.inf else None,
        "lr": last.get("lr"),
        "tokens_per_sec": speed,
        "wall_s": times[-1] - times[0] if times else 0.0,
        "rss_mb": last["system/rss_bytes"] / 1e6 if "system/rss_bytes" in last else None,
    }


# --- Parity ---------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """What a log says of the data, of its own tolerance, and the validation loss by step."""

    dataset: dict[str, Any]
    about: dict[str, Any]
    points: dict[int, float]


def read_curve(path: Path) -> Curve:
    """From the training script's JSON lines, or from a run's directory."""
    curve = Curve({}, {}, {})
    for line in _log_lines(path):
        event = line.get("event")
        if event == "dataset_info":
            curve.dataset.update(line)
        elif event == "baseline_info":
            curve.about.update(line)
        elif event == "validation_step" and {"step", "loss"} <= line.keys():
            curve.points[int(line["step"])] = float(line["loss"])
        elif "loss/val_step" in line.get("metrics", {}):
            curve.points[int(line["step"])] = float(line["metrics"]["loss/val_step"])
    if not curve.points:
        raise LogError(f"{path} holds no validation loss; give a script's log or a run directory")
    return curve


def _log_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        yield from read_run(path)
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError) as error:
            if number < len(lines):  # the last line may be torn, by a kill
                raise LogError(f"{path}, line {number} is no JSON object: {error}") from error


def parity(log: Curve, baseline: Curve, tolerance: float, last_tolerance: float) -> dict[str, Any]:
    """Compare two curves at every point of the baseline.

    Tolerances are in the loss's unit, 0 for equal bits. The verdict is "match", "differs",
    "another dataset" or "unfinished".
    """
    result: dict[str, Any] = {"tolerance": tolerance, "last_tolerance": last_tolerance}
    if other := _other_facts(log, baseline):
        return {"verdict": "another dataset", "dataset": other, **result}
    largest, end = 0.0, max(baseline.points)
    for step, expected in sorted(baseline.points.items()):
        if step not in log.points:
            verdict = "unfinished" if step > max(log.points) else "differs"
            return {"verdict": verdict, "step": step, "expected": expected, **result}
        off = abs(log.points[step] - expected)
        largest = max(largest, off)
        if not off <= (last_tolerance if step == end else tolerance):  # a NaN is off
            return {"verdict": "differs", "step": step, "got": log.points[step],
                    "expected": expected, "off": off, **result}  # fmt: skip
    return {"verdict": "match", "points": len(baseline.points), "largest": largest, "step": end,
            "got": log.points[end], "expected": baseline.points[end], **result}  # fmt: skip


def _other_facts(log: Curve, baseline: Curve) -> dict[str, list[Any]]:
    """The facts of the data that both state and that differ."""
    names = ("titles_count", "tokens_per_epoch", "batches_per_epoch", "vocab_size", "sha256")
    pairs = {name: [log.dataset.get(name), baseline.dataset.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}


def _sentence(result: Mapping[str, Any]) -> str:
    verdict = result["verdict"]
    if verdict == "another dataset":
        pairs = (f"{name} {a} here, {b} there" for name, (a, b) in result["dataset"].items())
        return f"another dataset, so the curves are not compared: {'; '.join(pairs)}"
    if verdict == "unfinished":
        return f"unfinished: it matches so far, and has no validation loss at step {result['step']}"
    if verdict == "differs" and "got" not in result:
        return f"differs: there is no validation loss at step {result['step']}"
    numbers = f"{result['got']!r} here, {result['expected']!r} in the baseline"
    if verdict == "differs":
        return f"differs from step {result['step']} on: {numbers}, {result['off']:.2e} apart"
    return (
        f"matches at all {result['points']} points, at most {result['largest']:.1e} apart; "
        f"at step {result['step']}: {numbers}"
    )


# --- Command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """0: it is so; 1: it is not; 2: the question could not be answered."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ObservabilityError, OSError) as error:
        print(f"observability: {error}", file=sys.stderr)
        return 2


def _parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="observability.py", description="Look at runs that observability.py recorded."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.removeprefix("_cmd_"), help=text, description=text)
        added.set_defaults(command=run)
        return added

    added = command(_cmd_summarize, "a table of runs")
    added.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
    added.add_argument("--json", action="store_true")
    added.add_argument("--csv", action="store_true")
    added = command(_cmd_parity, "compare a log's validation losses with a baseline's")
    added.add_argument("log", type=Path, help="JSON lines of the script, or a run's directory")
    added.add_argument("baseline", nargs="+", type=Path, help="of several, that of the same data")
    added.add_argument("--tolerance", type=float, help="on any point; default: the baseline's, "
                       f"else {TOLERANCE} and {TOLERANCE_LAST} on the last")  # fmt: skip
    added.add_argument("--exact", action="store_true", help="bit for bit")
    added.add_argument("--json", action="store_true")
    added = command(_cmd_rebuild, "write a run's TensorBoard events anew from its journal")
    added.add_argument("run", type=Path, metavar="RUN")
    added = command(_cmd_tb, "start TensorBoard on this machine's loopback")
    added.add_argument("dir", nargs="?", type=Path, default=script_dir() / "logs/tb", metavar="DIR")
    added.add_argument("--port", type=int, default=int(os.environ.get("TB_PORT", 6006)))
    return parser


def _cmd_summarize(options: Any) -> int:
    rows = [summary(run) for run in options.runs]
    if options.json:
        print(json.dumps(_strict(rows), indent=1))
    elif options.csv:
        import csv

        table = csv.DictWriter(sys.stdout, rows[0])
        table.writeheader()
        table.writerows(rows)
    else:
        cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    return 0


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _cmd_parity(options: Any) -> int:
    log, baselines = read_curve(options.log), [read_curve(path) for path in options.baseline]
    baseline = next((b for b in baselines if not _other_facts(log, b)), baselines[0])
    tolerance = last = 0.0 if options.exact else options.tolerance
    if tolerance is None:
        tolerance = baseline.about.get("tolerance", TOLERANCE)
        last = baseline.about.get("tolerance_last", TOLERANCE_LAST)
    result = parity(log, baseline, tolerance, last)
    print(json.dumps(_strict(result)) if options.json else f"{options.log} {_sentence(result)}")
    return {"match": 0, "another dataset": 2}.get(result["verdict"], 1)


def _cmd_rebuild(options: Any) -> int:
    print(rebuild(options.run))
    return 0


def _cmd_tb(options: Any) -> int:
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        install = f"{sys.executable} -m pip install tensorboard"
        raise ObservabilityError(f"TensorBoard is not installed; {install}")
    port = _free_port(options.port)
    url = f"http://127.0.0.1:{port}"
    print(f"{url} shows {options.dir} (pid {os.getpid()}; Ctrl-C ends it)", flush=True)
    server = [sys.executable, "-m", "tensorboard.main", "--logdir", str(options.dir)]
    os.execv(sys.executable, [*server, "--host", "127.0.0.1", "--port", str(port)])


def _free_port(first: int) -> int:
    import socket

    for port in range(first, first + 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ObservabilityError(f"ports {first} to {first + 99} are taken; give another with --port")


if __name__ == "__main__":
    sys.exit(main())
