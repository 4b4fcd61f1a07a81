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
        checkpoints/step_00000123/       what a resume needs, where saving is on
        plots/latest.png                 the curves, where matplotlib is installed

    python observability.py run|summarize|verify|plot|parity|rebuild|tb --help

What it promises: it draws no random number, reads no batch, runs no forward, sets no flag and never
waits for the device; a full disk ends the metrics, not the training; a SIGKILL loses no step.
It needs the standard library, and torch only where the training already has it.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import errno
import functools
import io
import json
import math
import mmap
import operator
import os
import platform
import random
import re
import shutil
import signal
import struct
import sys
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

try:
    import fcntl
except ImportError:  # Windows, where a live run is then not told from a dead one
    fcntl = None  # type: ignore[assignment]

__all__ = ["CheckpointError", "ObservabilityError", "Run", "add_arguments", "ended", "finish",
           "init", "latest_ckpt", "log", "read_run", "resume", "save", "skip_batch", "skip_epoch",
           "step", "validation", "watch"]  # fmt: skip

SCHEMA = 1
SHARD_BYTES = 64 << 20  # of the journal
TOLERANCE, TOLERANCE_LAST = 5e-4, 1e-4  # nats: how far the reference curve moves between devices

P = ParamSpec("P")
R = TypeVar("R")


class ObservabilityError(Exception):
    """Base of every error this module raises on purpose; none is raised into the training."""


class RunError(ObservabilityError):
    """A run directory is missing, unreadable, or of a newer schema than this file knows."""


class CheckpointError(ObservabilityError):
    """A checkpoint is missing, damaged, or not of this model; only resume() raises it."""


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
        self.degraded: dict[str, str] = {}  # what broke, and how
        self._started = time.time()
        self._lrs: dict[str, Any] = {}
        self._stepped = False  # an optimizer has stepped since the last call of step()
        self._mark: float | None = None  # perf_counter() when the current iteration began
        self._tokens = 0
        self._epoch_began = (0.0, 0)  # perf_counter(), tokens
        self._epoch_loss: Any = None
        self._forms: dict[tuple[str, ...], _Form] = {}
        self._in_flight: deque[tuple[_Form, float, int, list[Any]]] = deque()
        self._seq = self._drained = self._dropped = 0
        self._stuck_at = -1  # how far the sinks were when the ring was last found full for long
        self._lock = threading.RLock()  # reentrant, for a signal handler that calls in
        self._drain_lock, self._landing = threading.Lock(), threading.Lock()
        self._sinks: list[Sink] = []
        self._sinks_open = False
        self._curve = _Curve()
        self._keeper: Keeper | None = None
        self._origin: Path | None = None  # the checkpoint to go on from
        self._no_origin: CheckpointError | None = None
        self._drawing: Any = None  # the latest process that draws the curves
        self._rank = int(os.environ.get("RANK") or 0)
        enabled = enabled and os.environ.get("OBS_DISABLE", "0") in ("", "0")
        self._hooks: list[Any] = []
        self._wake, self._stopping = threading.Event(), False
        self._open = False
        if enabled:
            self._find_origin(script_dir() / out_dir)
        if enabled and self._rank == 0:
            self._open = bool(self._start(_plain(config), Path(out_dir), Path(tb_dir)))
        if self._open or self._origin:
            self._keep_checkpoints()

    @_fenced
    def _start(self, config: Any, out_dir: Path, tb_dir: Path) -> bool:
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.localtime(self._started))
        commit = git_commit()
        tb_run = script_dir() / tb_dir / f"{self.name or 'run'}_{stamp}"
        self.name = self.name or "_".join(filter(None, (stamp, (commit or "")[:7])))
        self._manifest = {**manifest(commit), "hyperparameters": config}
        earlier = _run_of(self._origin)
        try:
            self.dir = earlier or _new_dir(script_dir() / out_dir, self.name)
            self.name = self.dir.name
            if earlier:
                self._seq = self._drained = repair(earlier)
                tb_run = _tb_dir(earlier)
            self._ring = Ring(self.dir / "metrics.ring")
        except (OSError, RunError, ValueError) as error:
            self._degrade("the run directory", error)
            self._ring = Ring(None)
        if self.dir and not earlier:
            tb_path = os.path.relpath(tb_run, self.dir)
            header = {"schema": SCHEMA, "run": self.name, "created": self._started}
            self._save_json("config.json", {**header, "tb_dir": tb_path, "config": config})
        self._save_json("run_manifest.json", self._manifest)
        self._tb_run = tb_run
        self._event("start", run=self.name)
        if not self._origin:
            self._open_sinks()
        self._timer = threading.Thread(target=self._keep_draining, daemon=True)
        self._timer.start()
        atexit.register(self._at_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        return True

    def _open_sinks(self, cut: Mapping[str, Any] | None = None) -> None:
        """What came after the checkpoint whose state is `cut` is taken out first."""
        if cut and self.dir and _run_of(self._origin):
            self._curve.redone = cut_journal(self.dir, cut)
        if run_dir := self.dir:
            self._add_sink("journal", lambda: Journal(run_dir))
            self._add_sink("training.log", lambda: TrainingLog(run_dir))
        if self.settings.tensorboard:
            purge = cut["global_step"] + 1 if cut else None
            self._add_sink("TensorBoard", lambda: TensorBoard(self._tb_run, purge))
        if self.settings.wandb:
            config = self._manifest["hyperparameters"]
            # The same after a resume, and another on each machine and in each project.
            run_id = _sha256(self.dir / "config.json")[:16] if self.dir else None
            self._add_sink("W&B", lambda: WeightsAndBiases(self.name, config, self.dir, run_id))
        self._sinks_open = True

    def _forget(self) -> None:
        """In a forked worker: the run is its parent's, and so is the lock that says it lives."""
        if self._open:
            self._open = False
            self._ring.close()
        if self._keeper is not None:
            self._keeper.let_go(None)

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
        if self._keeper is not None:
            self._keeper.watch(model=list(models), optimizer=optimizer, scheduler=scheduler,
                               scaler=scaler, loader=loader)  # fmt: skip
        if not self._ready("watch"):
            return
        for index, each in enumerate(_several(optimizer)):
            self._follow_lr("lr" if index == 0 else f"lr/{index}", each)
        for model in models:
            count = sum(parameter.numel() for parameter in model.parameters())
            self._event("watch", model=type(model).__name__, parameters=count)
        self._mark = time.perf_counter()

    def resume(self, /, **defaults: Any) -> Any:
        """Before the loop: put back what a checkpoint holds, where the run is to go on from one.

        Args:
            defaults: the loop-carried locals, as the script begins with them.
        Returns: their values in order, as given or as saved; of a single one, the value itself.
        Raises:
            CheckpointError: the checkpoint that was asked for is not there, or does not fit.
        """
        self._put_back()
        return _in_order(defaults if self._keeper is None else self._keeper.locals(defaults))

    def _put_back(self) -> None:
        """By the first of resume() and skip_epoch(), the only calls that raise: no step is lost."""
        if self._no_origin is not None:
            raise self._no_origin
        if self._keeper is not None and not self._keeper.is_back:
            self._keeper.put_back(self._origin)
            if self._origin is not None:
                self._go_on(self._origin)

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
        samples: Any = None, carry: Mapping[str, Any] | None = None, last: bool = False,
        **metrics: Any,
    ) -> None:
        """Record one optimizer step; the last line of an iteration that made one.

        Args:
            step: its number; without it the run counts.
            loss: a number or a one-element tensor; a CUDA tensor is not waited for.
            tokens, samples: how many this step consumed, for the rates per second.
            carry: the loop-carried locals that a resumed run needs.
            last: the loop breaks after this step; a resumed run then leaves it at `ended`.
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
        if self._keeper is not None:
            self._after_step(carry, last)
            if self._keeper.signal is not None:
                self._obey(self._keeper)

    @_fenced
    def save(self, /) -> None:
        """A checkpoint now; within an iteration, at its step()."""
        if self._ready("save") and self._keeper is not None:
            self._keeper.ask(self.global_step)

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

    def skip_epoch(self, /, epoch: int | None = None) -> bool:
        """First line of an epoch's loop: `if obs.skip_epoch(epoch): continue`. Names the epoch.

        Raises CheckpointError where resume() would, and has not been called.
        """
        self._put_back()
        return bool(self._enter_epoch(epoch))

    @_fenced
    def _enter_epoch(self, epoch: int | None) -> bool:
        number = epoch if epoch is not None else (self.epoch or 0) + 1
        skip = self._keeper is not None and self._keeper.skip_epoch(number)
        if self._ready("skip_epoch"):
            self._begin_epoch(number)
            self._mark = time.perf_counter()
            self._epoch_loss = self._curve.epoch_losses.pop(number, None)
        return skip

    @_fenced
    def skip_batch(self, /) -> bool:
        """First line of the loop over batches: `if obs.skip_batch(): continue`."""
        return self._keeper is not None and self._keeper.skip_batch()

    @_fenced
    def ended(self, /) -> bool:
        """First line of a loop that breaks after its step: `if obs.ended(): break`."""
        return self._keeper is not None and self._keeper.ended()

    def finish(self, /, status: str = "completed", **results: Any) -> None:
        """Write out what is left, results.json too, and close; a second call does nothing."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            _fenced(keeper.finish)(not status.startswith(("failed", "unfinished", "signal")))
        if self._open:
            self._finish(status, results)
        if keeper is not None:
            keeper.let_go(keeper.signal)

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

    # Checkpoints.

    @_fenced
    def _find_origin(self, out_dir: Path) -> None:
        settings = self.settings
        try:
            self._origin = find_origin(settings.resume, out_dir, self.name, settings.ckpt_dir)
        except CheckpointError as error:  # resume() may raise it: the loop has not begun
            self._no_origin = error

    @_fenced
    def _keep_checkpoints(self) -> None:
        within = self.dir and self.dir / "checkpoints"
        given = self.settings.ckpt_dir and script_dir() / self.settings.ckpt_dir
        if (directory := given or within) or self._origin:
            self._keeper = Keeper(self.settings, Path(directory or ""), self._facts)
        if self._keeper is not None and self._open:
            self._keeper.manifest = json.dumps(_plain(self._manifest), indent=1).encode()
            self._keeper.on_saved = lambda path: self._event("saved", checkpoint=path.name)
            self._keeper.catch_signals()

    def _facts(self, step: int) -> Callable[[], dict[str, Any]]:
        """For state.json: what the run knows now, and what its records say when it is written."""
        now = {"tokens": self._tokens, "records": self._seq, "time": time.time(),
               "hyperparameters": self._manifest["hyperparameters"]}  # fmt: skip

        def facts() -> dict[str, Any]:
            self._land()
            self.drain()
            return dict(_plain({**now, **self._curve.facts(step)}))

        return facts

    @_fenced
    def _go_on(self, origin: Path) -> None:
        """Be the run that the checkpoint is of, from its step on."""
        state = read_state(origin)
        self.global_step, self._tokens = state["global_step"], state["tokens"]
        if not self._open:
            return
        now = {**numerics(), "hyperparameters": self._manifest["hyperparameters"]}
        if other := _differences(state, _plain(now)):
            _warn_once(f"resuming {origin} where not all is as it was, so the digits may differ: "
                       f"{'; '.join(other)}")  # fmt: skip
        self._curve.go_on(state)
        self._event("resume", checkpoint=origin.name, differs="; ".join(other))
        self._open_sinks(state)
        if self._keeper is not None:
            self._keeper.publish(origin)  # a kill may have come between its commit and this

    @_fenced
    def _after_step(self, carry: Mapping[str, Any] | None, last: bool) -> None:
        if self._keeper is not None:
            if self._open and not self._sinks_open:
                _warn_once("the run was to resume, but the script never calls resume()")
                self._open_sinks()
            self._keeper.after_step(self.global_step, carry, last)

    def _obey(self, keeper: Keeper) -> None:
        """End as the script would have, now that the step is saved."""
        number = keeper.signal
        keeper.wait()
        if keeper.kills():
            self._finish(f"signal {number}", {})
        keeper.let_go(number)

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
            self._in_flight.append((form, time.time(), step, values))

    def _land(self) -> None:
        if self._landing.acquire(blocking=False):  # one thread at a time, to keep their order
            try:
                while self._in_flight and _landed(self._in_flight[0][-1]):
                    form, wall, step, values = self._in_flight.popleft()
                    values = [v if type(v) is float else v.take() for v in values]
                    self._commit(form, wall, step, values)
            finally:
                self._landing.release()

    def _form(self, phase: str, metrics: Mapping[str, Any], tags: Mapping[str, Any]) -> _Form:
        key = (phase, *metrics)
        if not tags and (known := self._forms.get(key)):
            return known
        everything = {"phase": phase, "rank": self._rank, **tags}
        form = _form_of(json.dumps([everything, *map(str, metrics)]).encode())
        if not tags and len(self._forms) < 1000:
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

    def _sample(self) -> None:
        self._record("system", self.global_step, system_metrics())
        # Asked at init, the name of the device would start CUDA before the script does.
        known = numerics()["device"] if "torch" in sys.modules else None
        if known != self._manifest.get("device"):
            self._manifest["device"] = known
            self._save_json("run_manifest.json", self._manifest)

    def _keep_draining(self) -> None:
        sample_at, plot_at = 0.0, time.monotonic() + self.settings.plot_interval
        while not self._stopping:
            self._wake.wait(self.settings.drain_interval)
            self._wake.clear()
            try:
                if self.settings.system_interval > 0 and sample_at <= time.monotonic():
                    sample_at = time.monotonic() + self.settings.system_interval
                    self._sample()
                if self._keeper is not None and self._keeper.overdue(time.monotonic()):
                    os.kill(os.getpid(), self._keeper.signal or 0)
                self._land()
                self.drain()
                if self.settings.plot_interval > 0 and plot_at <= time.monotonic():
                    plot_at = time.monotonic() + self.settings.plot_interval
                    self._draw()
            except Exception as error:  # a device or a sink: the timer must outlive both
                self._degrade("the timer", error)
        self._close_sinks()

    def drain(self) -> None:
        """Hand what the ring holds to the sinks."""
        with self._drain_lock:
            while self._drained < self._seq and self._sinks_open:
                # A slice at a time: each write lets the training's thread run.
                upto = min(self._seq, self._drained + 64)
                records = map(self._ring.get, range(self._drained + 1, upto + 1))
                self._write([record for record in records if record is not None])
                self._drained = upto

    def _close_sinks(self) -> None:
        if not self._sinks_open:
            self._open_sinks()
        self.drain()
        while self._sinks:
            with contextlib.suppress(Exception):  # a stranger's close; the journal is written
                self._sinks.pop().close()

    def _write(self, records: list[Record]) -> None:
        for record in records:
            self._curve.take(record, self.epoch)
        for sink in list(self._sinks):
            try:
                sink.write(records)
            except Exception as error:  # a full disk, a stranger's package: the others go on
                self._sinks.remove(sink)
                self._degrade(type(sink).__name__, error)

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
        if self.settings.plot_interval > 0:
            self._draw(last=True)

    def _draw(self, *, last: bool = False) -> None:
        """By a process of its own at the lowest priority: a thread would hold the loop's GIL."""
        import importlib.util
        import subprocess

        drawing = self._drawing is not None and self._drawing.poll() is None
        if self.dir is None or (drawing and not last) or not importlib.util.find_spec("matplotlib"):
            return
        command = [sys.executable, os.path.abspath(__file__), "plot", str(self.dir)]
        nowhere = subprocess.DEVNULL
        self._drawing = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere,
                                         start_new_session=True)  # fmt: skip

    def _results(self, status: str, lost: int) -> dict[str, Any]:
        facts = {
            "schema": SCHEMA,
            "run": self.name,
            "status": status,
            "steps": self.global_step,
            "wall_s": round(time.time() - self._started, 3),
            **self._curve.results(),
            "best_checkpoint": str(best_ckpt(self.dir / "checkpoints") or "") if self.dir else "",
            **{k.removeprefix("system/"): v for k, v in system_metrics().items() if "peak" in k},
            "degraded": self.degraded,
            "lost_records": lost,
        }
        return {name: value for name, value in facts.items() if value not in (None, "")}

    def _save_json(self, name: str, content: Mapping[str, Any]) -> None:
        if self.dir is not None:
            try:
                _replace_file(self.dir / name, json.dumps(_plain(content), indent=1) + "\n")
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
    plot_interval: float = 300.0  # seconds between two drawings of the curves, 0 for none
    close_timeout: float = 5.0  # seconds that finish() may take, without a checkpoint
    save_interval: str = "0"  # optimizer steps between two checkpoints, or auto; 0 is off
    keep_last: int = 3  # checkpoints, beside the best and the one resumed from
    resume: str = "never"  # or auto, or the directory of a run or of a checkpoint
    ckpt_dir: str = ""  # where checkpoints lie; by default in the run's directory
    weights: str = ""  # a file for the weights alone, as of the latest checkpoint
    save_timeout: float = 120.0  # seconds that the last checkpoint may take

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> Settings:
        """Bad names and values are said, and the defaults stand."""
        settings = cls(wandb=os.environ.get("WANDB_MODE") in ("offline", "online", "shared"))
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        if unknown := sorted(set(given) - set(kinds)):
            _warn_once(f"init() has no setting {', '.join(unknown)}; it has {', '.join(kinds)}")
        for name, kind in kinds.items():
            plain = name.upper() if name in ("save_interval", "keep_last") else ""
            said = os.environ.get(plain) or os.environ.get(f"OBS_{name.upper()}")
            value = given.get(name, _from_arguments.get(name, said))
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
    globals().update({name: getattr(_run, name) for name in __all__ if hasattr(Run, name)})
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


def resume(**defaults: Any) -> Any:
    """The loop's locals in their order, as a checkpoint has them or as given: see `Run.resume`."""
    return _in_order(defaults) if _run is None else _run.resume(**defaults)


_from_arguments: dict[str, Any] = {}  # settings that came by way of the command line
_ARGUMENTS = {"resume", "ckpt_dir", "keep_last_checkpoints", "save_interval"}  # their names there


def add_arguments(parser: Any) -> None:
    """Give an argparse parser --resume, --ckpt_dir, --keep_last_checkpoints, --save_interval."""
    def add(option: str, setting: str, text: str, kind: type = str, **more: Any) -> None:
        def argument(said: str) -> Any:
            _from_arguments[setting] = kind(said)
            return _from_arguments[setting]

        if option not in parser._option_string_actions:  # else the script has its own
            parser.add_argument(option, type=argument, metavar=setting.upper(), help=text, **more)

    add("--resume", "resume", "auto, never, or a run's or a checkpoint's directory",
        nargs="?", const="auto")  # fmt: skip
    add("--ckpt_dir", "ckpt_dir", "where checkpoints lie")
    add("--keep_last_checkpoints", "keep_last", "how many are kept", int)
    add("--save_interval", "save_interval", "optimizer steps between two, or auto")


watch = _on_the_run(Run.watch)
step = _on_the_run(Run.step)
validation = _on_the_run(Run.validation)
skip_epoch = _on_the_run(Run.skip_epoch)
skip_batch = _on_the_run(Run.skip_batch)
ended = _on_the_run(Run.ended)
save = _on_the_run(Run.save)
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
        return json.dumps(_plain(self.as_dict())) + "\n"


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
        self.event = functools.cache(functools.partial(_EventForm, self.names))  # by step's bytes


_form_of = functools.lru_cache(1000)(_Form)  # a script may make up names without end


class Ring:
    """The latest records, in a file's shared memory: the kernel keeps them when we are killed."""

    SLOT = 1024  # bytes of a record: some thirty metrics; a wider record is split
    # Records between two drains. The kernel write-protects the pages at each write-back, and the
    # next store to each may then wait for the disk: few pages, few waits.
    SLOTS = 512

    def __init__(self, path: Path | None) -> None:
        self._fd = -1
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
        return _unpack(self.memory, seq % self.SLOTS * self.SLOT)

    def close(self) -> None:
        self.memory.close()
        if self._fd >= 0:
            os.close(self._fd)

    @classmethod
    def left_behind(cls, path: Path, after: int) -> list[Record]:
        """The whole records numbered above `after` in a dead or a living run's ring."""
        content = path.read_bytes() if path.exists() else b""
        found = [_unpack(content, at) for at in range(0, len(content), cls.SLOT)]
        whole = [record for record in found if record is not None and record.seq > after]
        return sorted(whole, key=operator.attrgetter("seq"))


def _unpack(memory: Any, at: int) -> Record | None:
    """The record in the slot that begins at `at`; None where there is none, or a torn one."""
    size, seq, wall, step, blob_size = _HEAD.unpack_from(memory, at)
    if not _HEAD.size <= size <= Ring.SLOT or seq != _TAIL.unpack_from(memory, at + size - 8)[0]:
        return None
    blob = bytes(memory[at + _HEAD.size : at + _HEAD.size + blob_size])
    form = _form_of(blob)
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


def _landed(values: Sequence[Any]) -> bool:
    for value in values:  # noqa: SIM110, a generator costs more, and each step passes here
        if value.__class__ is _Landing and not value.landed():
            return False
    return True


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

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        """With `purge_step`, TensorBoard forgets what earlier files have from that step on."""
        directory.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{platform.node()}.{os.getpid()}.obs"
        self._fd = _append_to(directory / name)
        head = b"\x09" + struct.pack("<d", now)
        _write_all(self._fd, _framed(head + b"\x1a\x0dbrain.Event:2"))
        if purge_step is not None:  # Event{step, session_log{status: START}}
            start = head + b"\x10" + _varint(purge_step) + b"\x3a\x02\x08\x01"
            _write_all(self._fd, _framed(start))

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

    def __init__(
        self, name: str, config: Mapping[str, Any], run_dir: Path | None, run_id: str | None = None
    ) -> None:  # fmt: skip
        with _generators_untouched():
            import wandb

            self._run = wandb.init(name=name, config=dict(config or {}), dir=run_dir, id=run_id,
                                   resume="allow" if run_id else None)  # fmt: skip

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
                self._say(**_plain({**line, **tags, **record.as_dict()["metrics"]}))

    def close(self) -> None:
        self._file.close()


# --- Saving and resuming --------------------------------------------------------------------------


class Keeper:
    """When a run saves, and how a killed one goes on to the same last digit.

    `iter(loader)` draws from the global generators, and so may every batch. A resumed epoch
    therefore begins with the generators as they were when it first began, passes the batches that
    are done, and at the last of them gives the generators the state that the checkpoint has.
    """

    PATIENCE = 25.0  # seconds that a signal waits for the end of a step
    SHARE = 0.005  # of the run's time, that saving at an interval of "auto" may cost

    def __init__(self, settings: Settings, directory: Path, facts: Callable[[int], Any]) -> None:
        self._settings, self._directory, self._facts = settings, directory, facts
        self.watched: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
        self.manifest = b"{}"
        self.every = _interval(settings.save_interval)  # steps; -1 is auto
        self.on_saved: Callable[[Path], None] = lambda path: None
        self.signal: int | None = None  # that came, and waits for the end of the step
        self._signal_at = 0.0
        self._previous: dict[int, Any] = {}
        self._saver: Saver | None = None
        self._carry: dict[str, Any] = {}  # the loop's locals, as resume() and step() had them last
        self._kept: dict[str, Any] = {}  # those of the checkpoint that have yet to be given back
        self._asked: set[str] = set()  # the names that have been
        self.is_back = False
        self._epoch: int | None = None
        self._batches = 0  # of this epoch, with the one under way
        self._between = False  # two iterations: what the script carries is what step() was given
        self._wanted = False
        self._step: int | None = None
        self._cost_s, self._saved_at = 0.0, time.monotonic()
        self._origin: Path | None = None
        self._start_rng: Any = None  # the generators before the loop over batches
        self._place: _Place | None = None  # that a resumed run has yet to come to
        self._broke = False  # the loop, after the step that was last
        self._leave = False  # the loop, in a resumed run

    def watch(self, **things: Any) -> None:
        for kind, given in things.items():
            known = {id(thing) for thing in self.watched[kind]}
            self.watched[kind] += [t for t in map(_bare, _several(given)) if id(t) not in known]

    # Saving.

    def after_step(self, step: int, carry: Mapping[str, Any] | None, last: bool) -> None:
        before, self._step, self._broke = self._step, step, last
        self._carry.update(carry or {})
        self._between = True
        if self.signal is not None or self._wanted or self._due(step, before, time.monotonic()):
            self.save(step)
        elif before is None and self.every:
            self._open().prepare(self._parts())

    def _due(self, step: int, before: int | None, now: float) -> bool:
        if self.every < 0:
            return now - self._saved_at >= max(10.0, self._cost_s / self.SHARE)
        return self.every > 0 and step // self.every > (before or 0) // self.every

    def ask(self, step: int) -> None:
        """Save now between two iterations; within one, at its end: only then is all of it done."""
        if self._between and self._batches:
            self.save(step)
        else:
            self._wanted = True

    def save(self, step: int, *, last: bool = False) -> bool:
        """Snapshot and write behind; the last one is waited for. False while one is in flight."""
        self._wanted = False
        began, saver = time.monotonic(), self._open()
        place = {"epoch": self._epoch, "step_in_epoch": self._batches, "ended": last,
                 "broke": self._broke, **numerics()}  # fmt: skip
        facts = self._facts(step)
        saver.save(step, self._parts(), lambda: {**place, **facts()},
                   wait=self._settings.save_timeout if last else 0)  # fmt: skip
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - began + saver.write_s
        return not saver.busy()

    def finish(self, completed: bool) -> None:
        """The last save, where saving is on and the loop has come to its end."""
        step, saving = self._step, self.every or self._wanted or self._saver
        if step is None or not saving:
            return
        if not (self.save(step, last=True) if completed else self.wait()):
            _warn_once(f"the checkpoint of step {step} took over "
                       f"{self._settings.save_timeout:g} s; raise save_timeout")  # fmt: skip
        if self._saver is not None:
            self._saver.close()

    def wait(self) -> bool:
        return self._saver is None or self._saver.wait(self._settings.save_timeout)

    def _open(self) -> Saver:
        if self._saver is None:
            store = CheckpointStore(self._directory, keep_last=self._settings.keep_last)
            store.resumed_from = self._origin
            self._saver = Saver(store, self.watched["optimizer"], on_saved=self._saved)
        return self._saver

    def _saved(self, path: Path) -> None:
        self.publish(path)
        self.on_saved(path)

    def publish(self, path: Path) -> None:
        """The plain weights too, where the script asks for them."""
        if self._settings.weights:
            publish_weights(path, script_dir() / self._settings.weights)

    def _parts(self) -> dict[str, Any]:
        *four, loaders = (self.watched[kind] for kind in _KINDS)
        states = [loader.state_dict() for loader in loaders if hasattr(loader, "load_state_dict")]
        parts = capture(*four, loader=states, carry=dict(self._carry), start=self._start_rng)
        return {**parts, "run_manifest.json": self.manifest}

    # Resuming.

    def put_back(self, origin: Path | None) -> None:
        """All that the checkpoint holds but the loop's locals. Raises CheckpointError."""
        self.is_back = True
        self._start_rng = rng_state() if "torch" in sys.modules else None
        if origin is None:
            return
        *four, loaders = (self.watched[kind] for kind in _KINDS)
        state, saved = read_state(origin), restore(origin, *four)
        for loader, loader_state in zip(loaders, saved["loader"], strict=False):
            loader.load_state_dict(loader_state)
        self._origin, self._step = origin, state["global_step"]
        epoch, batches = state["epoch"], state["step_in_epoch"]
        whole = not batches or (state["ended"] and epoch is not None)
        # A loader with a state of its own is at its place already, and at its end gives no batch.
        with contextlib.suppress(TypeError):  # some have no length
            if saved["loader"] and len(loaders[0]) == batches:
                saved = {**saved, "start": saved}
        passed = batches if saved["loader"] else 0
        self._place = _Place(epoch, batches, passed, whole, state["broke"], saved)
        if epoch is None:
            self._enter(self._place)
        self._kept = saved["carry"]

    def locals(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The loop's locals: each as it was saved, once; as given from then on."""
        absent = sorted(given.keys() - self._kept.keys() - self._asked)
        if absent and self._origin is not None:
            raise CheckpointError(
                f"{self._origin} has no {', '.join(absent)}, which resume() asks for; give step() "
                f"carry={{{', '.join(f'{name!r}: {name}' for name in absent)}}}")
        self._asked |= given.keys()
        values = {name: _like(self._kept.pop(name), value) if name in self._kept else value
                  for name, value in given.items()}  # fmt: skip
        if self._epoch is not None:  # before the loop they are what they begin with, not a state
            self._carry.update(values)
        return values

    def skip_epoch(self, epoch: int) -> bool:
        """Whether a resumed run has done all of this epoch already."""
        place = self._place
        if place is not None and place.epoch is not None and epoch <= place.epoch:
            return epoch < place.epoch or self._enter(place)
        self._place = None
        self._epoch, self._batches, self._between = epoch, 0, True
        self._start_rng = rng_state() if "torch" in sys.modules else None
        return False

    def _enter(self, place: _Place) -> bool:
        self._epoch, self._between = place.epoch, True
        self._broke = self._leave = place.broke
        if place.whole:
            self._place = None
            self._restore_rng(place.rng)
        else:
            self._restore_rng(place.rng["start"])
            self._start_rng, self._batches = rng_state(), place.passed
        return place.whole

    def skip_batch(self) -> bool:
        """Whether a resumed run has done this batch already."""
        self._batches, self._between = self._batches + 1, False
        if (place := self._place) is None or place.epoch != self._epoch:
            return False
        if self._batches >= place.batches:  # the last to pass, or a loader back at its place
            self._place = None
            self._restore_rng(place.rng)
        return self._batches <= place.batches

    def ended(self) -> bool:
        """Whether a resumed run left the loop after this batch; it is the last one to be passed."""
        if not self._leave or (self._place and self._batches + 1 < self._place.batches):
            return False
        if self._place is not None:
            self.skip_batch()
        self._leave = False
        return True

    def _restore_rng(self, rng: Mapping[str, Any]) -> None:
        if not int(os.environ.get("RANK") or 0):  # the others must not repeat the first one's
            set_rng_state(rng)

    # Signals.

    def catch_signals(self) -> None:
        """SIGTERM and SIGINT save at the end of the step; then the script ends as it would have."""
        if not self.every or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        if self.signal is not None or self._step is None:  # the second, or no loop is under way
            self.let_go(number)
        else:
            self.signal, self._signal_at = number, time.monotonic()

    def overdue(self, now: float) -> bool:
        """Whether a signal has waited too long for the end of a step."""
        return self.signal is not None and now - self._signal_at > self.PATIENCE

    def kills(self) -> bool:
        return not callable(self._previous.get(self.signal or 0))

    def let_go(self, number: int | None) -> None:
        """Give the signals back, and this one to whom it was for."""
        previous, self._previous, self.signal = self._previous, {}, None
        for caught, handler in previous.items():
            with contextlib.suppress(ValueError):  # not the main thread
                if signal.getsignal(caught) == self._note_signal:
                    signal.signal(caught, handler)
        if number is None:
            return
        if callable(handler := previous.get(number)):
            handler(number, None)
        else:
            os.kill(os.getpid(), number)


class _Curve:
    """The losses on their way to the sinks: the best, the tail that a checkpoint keeps, and
    whether a resumed run fits it."""

    def __init__(self) -> None:
        self.best: tuple[float, int] | None = None  # the lowest validation loss, and its step
        self.losses: deque[tuple[int, float]] = deque(maxlen=200)
        self.validations: deque[tuple[int, float, Any]] = deque(maxlen=200)
        self.epoch_losses: dict[Any, float] = {}  # the last validation loss of a resumed epoch
        self.redone: dict[int, float] = {}  # losses by step, of what a resumed run does again
        self._before: list[float] = []

    def take(self, record: Record, epoch: int | None) -> None:
        name = record.form.names[0] if record.values else ""
        if name == "loss/train":
            self.note(record.step, record.values[0])
        elif name == "loss/val_step":
            loss = record.values[0]
            self.validations.append((record.step, loss, epoch))
            if math.isfinite(loss) and (self.best is None or loss < self.best[0]):
                self.best = (loss, record.step)

    def results(self) -> dict[str, Any]:
        best_loss, best_step = self.best or (None, None)
        return {
            "final_train_loss": self.losses[-1][1] if self.losses else None,
            "final_val_loss": self.validations[-1][1] if self.validations else None,
            "best_val_loss": best_loss,
            "best_val_step": best_step,
        }

    def facts(self, step: int) -> dict[str, Any]:
        """As of a step; the writer may look when the loop is a little further."""
        history = [[at, loss] for at, loss in list(self.losses) if at <= step][-100:]
        facts: dict[str, Any] = {"best": self.best, "loss_history": history}
        for at, loss, epoch in [v for v in list(self.validations) if v[0] <= step][-1:]:
            facts |= {"val_loss": loss, "val_step": at, "val_epoch": epoch}
        return facts

    def go_on(self, state: Mapping[str, Any]) -> None:
        self.losses.extend((step, float(loss)) for step, loss in state["loss_history"])
        self._before = [loss for _, loss in self.losses][-20:]
        self.best = state.get("best")
        if "val_loss" in state:
            loss, epoch = float(state["val_loss"]), state["val_epoch"]
            self.validations.append((state["val_step"], loss, epoch))
            if epoch == state["epoch"]:
                self.epoch_losses[epoch] = loss

    def note(self, step: int, loss: float) -> None:
        self.losses.append((step, loss))
        again = self.redone.pop(step, None)
        if again not in (None, loss) and (again == again or loss == loss):
            self.redone.clear()
            _warn_once(f"the resumed run is not bit for bit the one before: at step {step} "
                       f"the loss is {loss!r}, before the interruption it was {again!r}")
        if before := self._before:
            self._before = []
            if again != loss and len(before) > 2 and not loss <= 2 * max(before) - min(before):
                _warn_once(f"the loss jumps at the resume: {loss:.6g} at step {step}, "
                           f"{before[-1]:.6g} before it")  # fmt: skip


def _in_order(values: Mapping[str, Any]) -> Any:
    """As an assignment takes them: a tuple, of a single one the value itself."""
    return next(iter(values.values())) if len(values) == 1 else tuple(values.values())


def _run_of(checkpoint: Path | None) -> Path | None:
    """The directory of the run that saved it; None where checkpoints lie elsewhere."""
    run_dir = checkpoint and checkpoint.resolve().parent.parent
    return run_dir if run_dir and (run_dir / "config.json").exists() else None


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each name that both have with another value, or that one of two configurations lacks."""
    found: list[str] = []
    for name in now.keys() - _ARGUMENTS:  # where to resume from says nothing of the digits
        old, new = then.get(name), now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences({**dict.fromkeys(new), **old}, {**dict.fromkeys(old), **new})
        elif old != new:
            found.append(f"{name} was {old!r}, is {new!r}")
    return found


_KINDS = ("model", "optimizer", "scheduler", "scaler", "loader")


class _Place(NamedTuple):
    """Where in its epoch a checkpoint was made."""

    epoch: Any
    batches: int
    passed: int  # of the batches, by the loader itself
    whole: bool  # nothing of the epoch is left to do
    broke: bool  # the loop was left here
    rng: dict[str, Any]  # the generators at the checkpoint; under "start", those before the loop


def _interval(value: str) -> int:
    try:
        return -1 if value == "auto" else max(0, int(value))
    except ValueError:
        _warn_once(f"save_interval={value!r} is neither a number of steps nor auto; none is saved")
        return 0


def _bare(thing: Any) -> Any:
    """The module within torch.compile's and DDP's wrappers: names without their prefixes."""
    inner = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module",
             "DataParallel": "module"}  # fmt: skip
    while name := inner.get(type(thing).__name__):
        thing = getattr(thing, name)
    return thing


def _like(saved: Any, given: Any) -> Any:
    """What was carried, its tensors on the device of those that the script gave."""
    if hasattr(saved, "untyped_storage"):
        return saved.to(getattr(given, "device", "cpu"))
    if isinstance(saved, dict):
        return {k: _like(v, given.get(k) if isinstance(given, dict) else given)
                for k, v in saved.items()}  # fmt: skip
    if isinstance(saved, list | tuple):
        pairs = zip_longest(saved, given[: len(saved)] if isinstance(given, list | tuple) else [])
        return type(saved)(_like(item, like) for item, like in pairs)
    return saved


def numerics() -> dict[str, Any]:
    """What decides about the last digits beside the seed: versions, device and flags."""
    torch = sys.modules["torch"]
    on_cuda = torch.cuda.is_initialized()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE") or 1),
    }


def find_origin(resume: str, out_dir: Path, name: str, ckpt_dir: str) -> Path | None:
    """The checkpoint that a run is to go on from: "never", "auto", or a path.

    Of "auto" it is the newest of the run of this name, or, without a name, of the newest run in
    `out_dir` that has not completed; None where there is none. Raises CheckpointError.
    """
    if resume in ("", "never"):
        return None
    if resume != "auto":
        return _checkpoint_at(Path(resume))
    if ckpt_dir:
        return latest_ckpt(script_dir() / ckpt_dir)
    runs = [out_dir / name] if name else _unfinished(out_dir)
    free = (run / "checkpoints" for run in runs if not alive(run))
    return next(filter(None, map(latest_ckpt, free)), None)


def _checkpoint_at(path: Path) -> Path:
    if (path / "state.json").exists():
        if damage := ckpt_damage(path):
            raise CheckpointError(f"checkpoint {path} is damaged ({damage}); resume from another")
        return path
    if found := latest_ckpt(path / "checkpoints") or latest_ckpt(path):
        return found
    raise CheckpointError(f"{path} holds no checkpoint; give the directory of a run or of a step")


def _unfinished(out_dir: Path) -> list[Path]:
    """Runs with checkpoints that have not completed, the newest first."""
    found = []
    for saved in out_dir.glob("*/checkpoints"):
        with contextlib.suppress(OSError, ValueError):
            results = saved.parent / "results.json"
            ended = json.loads(results.read_bytes())["status"] if results.exists() else "killed"
            if ended not in ("completed", "superseded"):
                found.append((saved.stat().st_mtime, saved.parent))
    return [run for _, run in sorted(found, reverse=True)]


def cut_journal(run_dir: Path, state: Mapping[str, Any]) -> dict[int, float]:
    """Take out what came after a checkpoint, for it will come again; returns its losses by step."""
    losses = {}
    for shard in _shards(run_dir):
        kept = []
        for line in shard.read_text(encoding="utf-8").splitlines(keepends=True):
            record = json.loads(line)
            # Values that came from a device later than the checkpoint are numbered later too.
            again = record["seq"] > state["records"] and (
                record["step"] > state["global_step"] or record["time"] > state["time"])
            if record["tags"]["phase"] == "event" or not again:
                kept.append(line)
            elif "loss/train" in record["metrics"]:
                losses[record["step"]] = float(record["metrics"]["loss/train"])
        _replace_file(shard, "".join(kept))
    return losses


# --- Checkpoints: on disk -------------------------------------------------------------------------


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
        except BaseException:  # the disk's errors, a stranger's state, an interrupt: all go on up
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
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor() as pool:
            sums = pool.map(_sum_file, [path / name for name in files])
            bad = [name for name, found in zip(files, sums, strict=True) if found != files[name]]
    except (OSError, CheckpointError) as error:
        return str(error)
    return f"{', '.join(bad)} is not what was written" if bad else None


def publish_weights(checkpoint: Path, target: Path) -> None:
    """Put a checkpoint's model.pth at `target` as well, whole or not at all."""
    _make_dirs(target.parent)
    staging = target.with_name(f".tmp-{target.name}")  # the next one sweeps what a kill left
    staging.unlink(missing_ok=True)
    try:
        os.link(checkpoint / "model.pth", staging)
    except OSError:  # another file system, or one without links
        shutil.copyfile(checkpoint / "model.pth", staging)
    os.replace(staging, target)
    staging.unlink(missing_ok=True)  # a rename onto another link to the same file does nothing
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


class _Summed(io.RawIOBase):
    """A file that sums what is written to it.

    CRC-32: with the size it catches every burst of up to 32 flipped bits, and all else but one
    case in 2^32, at twice the speed of SHA-256. What guards against malice is `weights_only`.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self.size, self.crc = fd, 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = memoryview(data)[:_CHUNK]
        self.crc = zlib.crc32(piece, self.crc)
        self.size += _write_all(self._fd, piece)
        return len(piece)


def _write(path: Path, content: Any) -> dict[str, Any]:
    """Create `path`, durably, and return its entry in state.json."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        raw = _Summed(fd)
        # torch.save writes five scraps for each tensor, and each would hand the GIL to and fro.
        with io.BufferedWriter(raw, 1 << 20) as out:
            if isinstance(content, bytes):
                out.write(content)
            else:
                _reserve(fd, sum(size for _, size in set(map(_key, _tensors(content)))))
                _torch().save(content, out)
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"size": raw.size, "crc32": f"{raw.crc:08x}"}


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


# --- Checkpoints: what they hold ------------------------------------------------------------------


def capture(
    models: Sequence[Any], optimizers: Sequence[Any] = (), schedulers: Sequence[Any] = (),
    scalers: Sequence[Any] = (), **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What to save, by file name, still referring to the live tensors. `more` joins the RNG file.

    One model is its plain `state_dict()`; several are a dict with the keys "0", "1", ….
    """
    weights = {str(index): _weights(model) for index, model in enumerate(models)}
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


def _weights(model: Any) -> Mapping[str, Any]:
    """The live parameters themselves: to detach each would take half of the time."""
    plain = getattr(type(model), "state_dict", None) is _torch().nn.Module.state_dict
    weights: Mapping[str, Any] = model.state_dict(**{"keep_vars": True} if plain else {})
    return weights


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
    here, there = ([len(each) for each in side] for side in zip(*pairs, strict=True))
    if here != there:
        raise CheckpointError(f"{path} has {there} models, optimizers, schedulers and scalers, "
                              f"watch() was given {here}; watch the same")  # fmt: skip
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
    there, here = ({name: tuple(getattr(value, "shape", ())) for name, value in tree.items()}
                   for tree in (saved, own))  # fmt: skip
    wrong = {
        "missing": here.keys() - there.keys(),
        "unexpected": there.keys() - here.keys(),
        "mis-shaped (saved, here)":
            {f"{n} {there[n]}, {here[n]}" for n in there.keys() & here if there[n] != here[n]},
    }  # fmt: skip
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"{path} is of a different model; {'; '.join(found)}")


def rng_state() -> dict[str, Any]:
    """Every generator a loop draws from, in types that `weights_only` loads. Draws nothing.

    Words are a tensor: to pickle each of a thousand numbers would hold the GIL for milliseconds.
    """
    torch = _torch()
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": (version, torch.tensor(words), gauss)}
    state["torch"] = torch.get_rng_state()
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, torch.tensor(keys.tolist()), *rest)
    if torch.cuda.is_initialized():  # the host's record of seed and offset: no wait for the device
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    torch = _torch()
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.tolist(), *rest))
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
        self.store, self._warn, self._on_saved = store, warn, on_saved
        self._optimizers = [o for o in optimizers if hasattr(o, "register_step_pre_hook")]
        self.skipped = self.failed = 0  # skipped: came while another one was being written
        self._arena: _Arena | None = None
        self._thread: threading.Thread | None = None
        self._last_step: int | None = None
        self._checked = False
        self.write_s = 0.0  # processor time of the latest write
        hooked = (o.register_step_pre_hook(self._hold_step) for o in self._optimizers)
        self._hooks = list(hooked)

    def prepare(self, parts: Mapping[str, Any]) -> None:
        """Reserve the memory for this state in the background: up to seconds for 4 GB on a GPU."""
        if not self.busy():
            tensors = _snapshot(parts, {})[1]
            self._start(lambda: self._fit(tensors), "cannot reserve memory for checkpoints")

    def save(
        self, step: int, parts: Mapping[str, Any], state: Any, *, wait: float = 0
    ) -> bool:  # fmt: skip
        """Snapshot `parts` now, write behind; False when skipped, failed or saved already.

        `wait` is for how many seconds it may wait for a save in flight, and then for its own; it is
        skipped while one is in flight. `state` may be a function, which the writer then calls.
        """
        if not self.wait(wait):
            self.skipped += 1
            return False
        if step == self._last_step or self.store.path(step) == self.store.resumed_from:
            return False
        complaint = f"step {step} was not saved"
        try:
            snapshot, tensors = _snapshot(parts, self._arena.tensors if self._arena else {})
            arena = self._fit(tensors)
            arena.fill()
        except Exception as error:  # a stranger's state, or no memory: the training goes on
            self._arena = None
            self._fail(complaint, error)
            return False
        self._last_step = step
        job = functools.partial(self._write, step, snapshot, arena, state)
        self._start(job, complaint, hurry=wait > 0)
        self.wait(wait)
        return True

    def close(self) -> None:
        """Leave nothing in the optimizers."""
        for hook in self._hooks:
            hook.remove()

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
        self, step: int, snapshot: Mapping[str, Any], arena: _Arena, state: Any
    ) -> None:
        files = arena.on_host(snapshot)
        if not self._checked:  # once: what a resume would refuse must not pass for saved
            _check_loads(files)
            self._checked = True
        state = {"global_step": step, **(state() if callable(state) else state)}
        self._on_saved(self.store.commit(step, files, state))

    def _start(self, job: Callable[[], Any], complaint: str, *, hurry: bool = False) -> None:
        def run() -> None:
            if not hurry and sys.platform == "linux":  # where niceness is a thread's own
                # The writer takes what time the loop leaves.
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            began = time.thread_time()
            try:
                job()
                self.write_s = time.thread_time() - began
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
        self.tensors = {id(t): t for t in tensors}  # alive, so that an id stays theirs
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


def _snapshot(
    parts: Mapping[str, Any], known: Mapping[int, Any]
) -> tuple[dict[str, Any], list[Any]]:
    """A copy of the parts, and those tensors in it that are still the live ones.

    Live are models and optimizers, which an arena copies as a whole; what is new at every save
    (RNG states, carried batches) or of an unusual kind is copied here and now.
    """
    torch = _torch()
    plain, live = {torch.Tensor, torch.nn.Parameter}, []

    def take(t: Any) -> Any:
        if id(t) in known:  # by the last save: its kind need not be looked at again
            live.append(t)
            return t
        if type(t) not in plain or t.layout is not torch.strided or not (t.is_cuda or t.is_cpu):
            return t.detach().cpu().clone()  # may wait, and is rare
        if not t.numel():
            return t.detach()
        live.append(t)
        return t

    def copied(t: Any) -> Any:
        return t.detach().clone()

    tree = {name: _map(part, copied if name == "rng_state.pt" else take)
            for name, part in parts.items()}  # fmt: skip
    return tree, live


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of the tree, with its tensors changed and nothing shared that could change later."""
    tensor, scalars = _torch().Tensor, {int, float, bool, str, bytes, type(None)}

    def walk(tree: Any) -> Any:
        kind = type(tree)
        if kind is dict:
            return {key: walk(value) for key, value in tree.items()}
        if isinstance(tree, tensor):
            return change(tree)
        if kind in scalars:
            return tree
        if kind is list or kind is tuple:
            return kind([walk(item) for item in tree])
        twin = copy.copy(tree) if isinstance(tree, dict) else copy.deepcopy(tree)
        if isinstance(tree, dict):  # keeps its kind, and the `_metadata` of a state_dict
            twin.update([(key, walk(value)) for key, value in tree.items()])
        return twin

    return walk(tree)


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
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_sha": commit,
        "lock_sha256": next((_sha256(lock) for lock in locks if lock.is_file()), None),
        "env": {k: v for k, v in sorted(os.environ.items()) if _ENVIRONMENT.fullmatch(k)},
        "script": script.name,
        "script_sha256": _sha256(script) if script.is_file() else None,
        "command_line": _redacted(sys.argv),
    }
    if "torch" in sys.modules:
        facts |= numerics()
    return {name: _plain(value) for name, value in facts.items() if value is not None}


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
    """Anything as strict JSON, its secrets redacted.

    JSON has no NaN and no infinities: they are the strings "NaN", "Infinity", "-Infinity".
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif type(value).__name__ in ("Namespace", "SimpleNamespace"):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple | set | deque):
        return [_plain(each, name) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
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


def _write_all(fd: int, data: Any) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def _replace_file(path: Path, content: str | bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def _lock_file(fd: int) -> bool:
    """Whether the file is ours alone now; a lock that ends with the process."""
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


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
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS wants to write
    try:
        if not _lock_file(handle):
            raise BlockingIOError(f"{path} is in use by another process")
        yield
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _torch() -> Any:
    """Imported by what needs it: the commands that only read a run do without."""
    import torch

    return torch


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


@contextlib.contextmanager
def _generators_untouched() -> Iterator[None]:
    """Python's and numpy's random state stay, whatever a stranger's package draws."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


# --- A script as it is ----------------------------------------------------------------------------


class Onlooker:
    """Records a script without call sites, by the hooks that torch has for every optimizer.

    A step is one of the optimizer that steps first; what the others' steps have is recorded with
    their number behind its name. Evaluations and the place in the loop cannot be seen.
    """

    SHARE = 0.005  # of the loop's time, that gradient norms may take

    def __init__(self) -> None:
        self.run: Run | None = None
        self._optimizers: list[Any] = []
        self._loss: Any = None  # back-propagated since the last step; of several, their sum
        self._scaled: tuple[Any, Any] | None = None  # by a GradScaler, and what it was
        self._stepping = False  # a closure evaluates again and again, and the last loss counts
        self._norm: dict[str, Any] = {}
        self._norm_at = self._steps = 0
        self._began = 0.0

    def install(self) -> None:
        from torch.optim import optimizer as optim

        torch = _torch()
        optim.register_optimizer_step_pre_hook(_fenced(self._before_step))
        optim.register_optimizer_step_post_hook(_fenced(self._after_step))
        _wrap(torch.autograd, "backward", before=_fenced(self._note_loss))
        scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
        _wrap(scaler, "scale", after=_fenced(self._note_scaled))

    def _note_scaled(self, result: Any, _: Any, outputs: Any) -> None:
        self._scaled = (result, outputs)

    def _note_loss(self, tensors: Any, *_: Any, **__: Any) -> None:
        scaled, self._scaled = self._scaled, None
        if scaled is not None and scaled[0] is tensors:
            tensors = scaled[1]
        losses = [tensor.detach() for tensor in _several(tensors) if tensor.numel() == 1]
        if losses and not self._stepping and self._loss is not None:
            losses.append(self._loss)
        self._loss = sum(losses[1:], losses[0]) if losses else self._loss

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if self.run is None:
            if _run is not None:
                return  # the script's own
            self.run = init(save_interval=0, resume="never")
            self._began = time.perf_counter()
        if not any(known is optimizer for known in self._optimizers):
            self._optimizers.append(optimizer)
            self.run.watch(optimizer=optimizer)
        self._stepping = True
        if optimizer is self._optimizers[0] and self._steps >= self._norm_at:
            self._note_norm(optimizer)

    def _note_norm(self, optimizer: Any) -> None:
        """Of what the optimizer is about to apply: clipped and unscaled. As often as is cheap."""
        torch, began = _torch(), time.perf_counter()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]
                 if p.grad is not None and p.grad.layout is torch.strided]  # fmt: skip
        if grads and len({grad.device for grad in grads}) == 1:
            with torch.no_grad():
                norms = [norm.float() for norm in torch._foreach_norm(grads)]
                self._norm = {"grad_norm": torch.linalg.vector_norm(torch.stack(norms))}
        now = time.perf_counter()
        step_s = (now - self._began) / (self._steps + 1)
        if self._steps > 2:  # the first ones are slow and say nothing of the later
            self._norm_at = self._steps + 1 + int((now - began) / (self.SHARE * step_s))

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        loss, self._loss, self._stepping = self._loss, None, False
        if self.run is None:
            return
        if optimizer is not self._optimizers[0]:
            number = next(i for i, known in enumerate(self._optimizers) if known is optimizer)
            self.run.log({} if loss is None else {f"loss/train/{number}": loss})
            return
        metrics, self._norm = self._norm, {}
        if self.run._mark is not None:
            metrics["speed/step_s"] = time.perf_counter() - self.run._mark
        self._steps += 1
        self.run.step(loss=loss, **metrics)

    def seen(self) -> str:
        """What was recorded, and what it takes to record the rest."""
        if self.run is None:
            why = "no optimizer has stepped" if not _run else "the script has its own call sites"
            return f"observability: {why}; nothing is added"
        return (f"observability: {self._steps} steps are in {self.run.dir}; without call sites "
                "evaluations are not seen, and no run can be resumed")  # fmt: skip


def _wrap(
    owner: Any, name: str, *, before: Callable[..., Any] = lambda *_, **__: None,
    after: Callable[..., Any] = lambda *_, **__: None,
) -> None:  # fmt: skip
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        result = original(*args, **kwargs)
        after(result, *args, **kwargs)
        return result

    setattr(owner, name, call)


class _WhenImported:
    """Calls back when the script has imported a module: imported before, it would not find what
    the script puts into the environment for it."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        import importlib.util

        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            _wrap(spec.loader, "exec_module", after=lambda *_: _fenced(self._then)())
        return spec


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Run a training script as Python would, and record what can be seen from outside."""
    import runpy

    onlooker = Onlooker()
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.resolve().parent)
    sys.meta_path.insert(0, _WhenImported("torch", onlooker.install))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except BaseException as error:  # the script's: its end is noted, and goes on up
        ended = isinstance(error, SystemExit) and error.code in (None, 0)
        finish("completed" if ended else f"failed: {type(error).__name__}")
        raise
    finally:
        finish()
        print(onlooker.seen(), file=sys.stderr)


# --- Reading a run --------------------------------------------------------------------------------


def _shard_name(number: int) -> str:
    return f"metrics.{number}.ndjson" if number else "metrics.ndjson"


def _shards(run_dir: Path) -> list[Path]:
    paths: list[Path] = []
    while (path := run_dir / _shard_name(len(paths))).exists():
        paths.append(path)
    return paths


def read_run(run_dir: str | Path, damage: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a run in their order, those too that a SIGKILL left in its ring.

    Args:
        damage: gets a sentence for each line of the journal that is no record.
    Raises:
        RunError: there is no journal, or it is of a newer schema.
    """
    seq = 0
    for record in _journal(Path(run_dir), [] if damage is None else damage):
        seq = record["seq"]
        yield record
    for left in Ring.left_behind(Path(run_dir) / "metrics.ring", seq):
        yield _plain(left.as_dict())


def _journal(run_dir: Path, damage: list[str]) -> Iterator[dict[str, Any]]:
    shards, ring = _shards(run_dir), run_dir / "metrics.ring"
    if not shards:
        raise RunError(f"{run_dir} holds no metrics.ndjson; give the directory of a run")
    lines = ((path, *line) for path in shards for line in enumerate(path.open("rb"), 1))
    for path, number, line in lines:
        torn = not line.endswith(b"\n")
        try:
            record = json.loads(b"" if torn else line)
            if record["schema"] > SCHEMA:
                raise RunError(f"{run_dir} has schema {record['schema']}, this file knows up to "
                               f"{SCHEMA}; use the observability.py that wrote it")  # fmt: skip
            _FIELDS(record)
        except (ValueError, TypeError, KeyError):
            if not (torn and ring.exists()):  # else a kill's, and the ring has the record
                damage.append(f"{path}, line {number}: no whole record")
            continue
        yield record


_FIELDS = operator.itemgetter("seq", "time", "step", "metrics", "tags")


def repair(run_dir: Path) -> int:
    """Make a killed run's journal whole: cut a torn last line, append what its ring still holds.

    Returns the number of its last record; 0 for a living run, which is left alone.
    """
    if alive(run_dir):
        return 0
    written = max((record["seq"] for record in _journal(run_dir, [])), default=0)
    last = _shards(run_dir)[-1]
    os.truncate(last, last.read_bytes().rfind(b"\n") + 1)
    left = Ring.left_behind(run_dir / "metrics.ring", written)
    with last.open("a", encoding="utf-8") as file:
        file.writelines(record.line() for record in left)
    (run_dir / "metrics.ring").unlink(missing_ok=True)
    return left[-1].seq if left else written


def alive(run_dir: Path) -> bool:
    """Whether a process is still writing this run."""
    try:
        with _locked(run_dir / "metrics.ring"):
            return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


def rebuild(run_dir: Path) -> Path:
    """Write the run's TensorBoard events anew from its journal, and return their directory."""
    if alive(run_dir):
        raise RunError(f"{run_dir} is still being written; rebuild it when the run has ended")
    repair(run_dir)
    records = list(read_run(run_dir))
    directory = _tb_dir(run_dir)
    for old in directory.glob("events.out.tfevents.*.obs"):
        old.unlink()  # first: the new file may get the name of an old one
    sink = TensorBoard(directory)
    for record in records:
        form = _form_of(json.dumps([record["tags"], *record["metrics"]]).encode())
        values = [float(value) for value in record["metrics"].values()]
        sink.write([Record(form, record["seq"], record["time"], record["step"], values)])
    sink.close()
    return directory


def _tb_dir(run_dir: Path) -> Path:
    header = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    return Path(run_dir / header["tb_dir"]).resolve()


def summary(run_dir: Path) -> dict[str, Any]:
    """A run in a line: how it ended, its losses, its median speed, its memory."""
    last: dict[str, float] = {}
    best: tuple[float | None, int | None] = (None, None)
    speeds, steps, status, times = [], 0, "", []
    for record in read_run(run_dir):
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        last |= metrics
        steps, status = max(steps, record["step"]), record["tags"].get("status", status)
        times.append(record["time"])
        speeds += [v for k, v in metrics.items() if k == "speed/tokens_per_sec_step"]
        loss = metrics.get("loss/val_step", math.nan)
        if loss < (math.inf if best[0] is None else best[0]):
            best = (loss, record["step"])
    return {
        "run": run_dir.name,
        "status": status or ("running" if alive(run_dir) else "killed"),
        "steps": steps,
        "train_loss": last.get("loss/train"),
        "val_loss": last.get("loss/val_step"),
        "best_val_loss": best[0],
        "best_step": best[1],
        "lr": last.get("lr"),
        "tokens_per_sec": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "wall_s": times[-1] - times[0] if times else 0.0,
        "rss_mb": last["system/rss_bytes"] / 1e6 if "system/rss_bytes" in last else None,
    }


def verify(run_dir: Path) -> dict[str, Any]:
    """What was checked, and a line for each damage: checkpoints, journal, event files."""
    saved = [path for path, _ in checkpoints(run_dir / "checkpoints")]
    damage = [f"{path}: {found}" for path in saved if (found := ckpt_damage(path))]
    damage += [str(path) for path in (run_dir / "checkpoints").glob(".corrupt-*")]
    records = list(read_run(run_dir, damage))
    damage += _gaps(records)
    events = sorted(_tb_dir(run_dir).glob("events.out.tfevents.*.obs"))
    damage += [f"{path}: {found}" for path in events if (found := _event_damage(path))]
    checked = f"{len(saved)} checkpoints, {len(records)} records, {len(events)} event files"
    return {"run": str(run_dir), "checked": checked, "damage": damage}


def _gaps(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the numbers do not go on by one, as they need not where a resume took records out."""
    resumed = any(record["tags"].get("event") == "resume" for record in records)
    pairs = pairwise(record["seq"] for record in records)
    return [f"metrics.ndjson: record {b} follows {a}"
            for a, b in pairs if b <= a or (b > a + 1 and not resumed)]  # fmt: skip


def _event_damage(path: Path) -> str | None:
    """What is wrong with an event file; a torn last event is a kill's, and harms no reader."""
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if _masked(_crc(data[at : at + 8])) != data[at + 8 : at + 12]:
            return f"the length at byte {at} is not what was written"
        body = data[at + 12 : at + 12 + length]
        crc = data[at + 12 + length : at + 16 + length]
        if len(crc) == 4 and crc != _masked(_crc(body)):
            return f"the event at byte {at} is not what was written"
        at += 16 + length
    return None


# --- Plots ----------------------------------------------------------------------------------------

# A panel's title, and the records that it shows.
_PANELS = (
    ("loss", re.compile(r"loss/(train|val_step)")),
    ("learning rate", re.compile(r"lr(/\d+)?")),
    ("throughput (1/s)", re.compile(r"speed/(tokens|samples)_per_sec_step")),
    ("gradient norm", re.compile(r"(.*[/_])?grad(ient)?_norm")),
)
_POINTS = 20_000  # of a curve that are kept; where there are more, every other one of the older


def plot(run_dir: Path) -> Path:
    """Draw the run so far, for good under its time and step, and as plots/latest.png.

    Raises RunError where there is no journal, ObservabilityError where matplotlib is missing.
    """
    curves, resumes, steps = _curves(run_dir)
    image = _drawn(run_dir.name, curves, resumes)
    (run_dir / "plots").mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
    path = run_dir / "plots" / f"curves_{stamp}_step_{steps:08d}.png"
    _replace_file(path, image)
    _replace_file(path.with_name("latest.png"), image)
    return path


def _curves(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], list[int], int]:
    """Points by name, the steps at which the run was resumed, and its last step."""
    curves: dict[str, list[tuple[int, float]]] = {}
    resumes, steps = [], 0
    for record in read_run(run_dir):
        steps = max(steps, record["step"])
        if record["tags"].get("event") == "resume":
            resumes.append(record["step"])
        for name, value in record["metrics"].items():
            if any(shown.fullmatch(name) for _, shown in _PANELS):
                points = curves.setdefault(name, [])
                points.append((record["step"], float(value)))
                if len(points) > _POINTS:
                    del points[:-1:2]
    return curves, resumes, steps


def _drawn(title: str, curves: Mapping[str, Any], resumes: Sequence[int]) -> bytes:
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        install = f"{sys.executable} -m pip install matplotlib"
        raise ObservabilityError(f"matplotlib is not installed; {install}") from error
    panels = [(label, names) for label, shown in _PANELS
              if (names := [name for name in curves if shown.fullmatch(name)])]  # fmt: skip
    figure = Figure(figsize=(9, 1 + 2.2 * len(panels)), layout="constrained")
    figure.suptitle(title)
    for row, (label, names) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, row)
        for name in names:
            few = len(curves[name]) < 100
            axes.plot(*zip(*curves[name], strict=True), label=name, marker="." if few else "",
                      linewidth=1)  # fmt: skip
        for number, step in enumerate(resumes):
            axes.axvline(step, color="grey", linestyle=":", label="_" * bool(number) + "resumed")
        axes.set(ylabel=label, xlabel="step" if row == len(panels) else "")
        axes.legend(loc="upper right", fontsize="small")
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


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
    steps, end = sorted(baseline.points), max(baseline.points)
    off = {step: abs(log.points.get(step, math.nan) - baseline.points[step]) for step in steps}
    within = {step: off[step] <= tolerance for step in steps}  # a NaN is not
    within[end] = off[end] <= last_tolerance
    step = next((step for step in steps if not within[step]), end)
    unfinished = step not in log.points and step > max(log.points)
    verdict = "match" if within[step] else "unfinished" if unfinished else "differs"
    return {"verdict": verdict, "points": len(steps), "largest": max(off.values()), "step": step,
            "got": log.points.get(step), "expected": baseline.points[step], "off": off[step],
            **result}  # fmt: skip


def _other_facts(log: Curve, baseline: Curve) -> dict[str, list[Any]]:
    """The facts of the data that both state and that differ."""
    names = ("titles_count", "tokens_per_epoch", "batches_per_epoch", "vocab_size", "sha256")
    pairs = {name: [log.dataset.get(name), baseline.dataset.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}


def _sentence(result: Mapping[str, Any]) -> str:
    verdict, step = result["verdict"], result.get("step")
    if verdict == "another dataset":
        pairs = (f"{name} {a} here, {b} there" for name, (a, b) in result["dataset"].items())
        return f"another dataset, so the curves are not compared: {'; '.join(pairs)}"
    if verdict == "unfinished":
        return f"unfinished: it matches so far, and has no validation loss at step {step}"
    if result["got"] is None:
        return f"differs: there is no validation loss at step {step}"
    numbers = f"{result['got']!r} here, {result['expected']!r} in the baseline"
    if verdict == "differs":
        return f"differs from step {step} on: {numbers}, {result['off']:.2e} apart"
    most = f"at most {result['largest']:.1e} apart"
    return f"matches at all {result['points']} points, {most}; at step {step}: {numbers}"


# --- Command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """0: it is so; 1: it is not; 2: the question could not be answered."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except (ObservabilityError, OSError) as error:
        print(f"observability: {error}", file=sys.stderr)
        return 2


def _parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="observability.py", description="Look at runs that observability.py recorded."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[Any], int | None], text: str) -> argparse.ArgumentParser:
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
    added = command(_cmd_verify, "check every byte of a run that has a checksum")
    added.add_argument("run", type=Path, metavar="RUN")
    added.add_argument("--json", action="store_true")
    added = command(_cmd_rebuild, "write a run's TensorBoard events anew from its journal")
    added.add_argument("run", type=Path, metavar="RUN")
    added = command(_cmd_plot, "draw a run's curves into its plots/, by matplotlib")
    added.add_argument("run", type=Path, metavar="RUN")
    added = command(_cmd_run, "run a training script as it is, and record what can be seen")
    added.add_argument("script", type=Path, metavar="TRAIN.PY")
    added.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    added = command(_cmd_tb, "start TensorBoard on this machine's loopback")
    added.add_argument("dir", nargs="?", type=Path, default=script_dir() / "logs/tb", metavar="DIR")
    added.add_argument("--port", type=int, default=int(os.environ.get("TB_PORT", 6006)))
    return parser


def _cmd_summarize(options: Any) -> None:
    rows = [summary(run) for run in options.runs]
    if options.json:
        print(json.dumps(_plain(rows), indent=1))
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
    print(json.dumps(_plain(result)) if options.json else f"{options.log} {_sentence(result)}")
    return {"match": 0, "another dataset": 2}.get(result["verdict"], 1)


def _cmd_verify(options: Any) -> int:
    found = verify(options.run)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join([*found["damage"], f"{options.run}: {found['checked']}"]))
    return 1 if found["damage"] else 0


def _cmd_plot(options: Any) -> None:
    with contextlib.suppress(AttributeError, OSError):  # Windows
        os.nice(19)  # the cores are the training's
    print(plot(options.run))


def _cmd_run(options: Any) -> None:
    if not options.script.is_file():
        raise ObservabilityError(f"{options.script} is no file; give the training script")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import observability  # a script that imports it must find the copy that records

    del sys.path[0]
    observability.run_script(options.script, options.arguments)


def _cmd_rebuild(options: Any) -> None:
    print(rebuild(options.run))


def _cmd_tb(options: Any) -> None:
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
