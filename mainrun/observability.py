"""Watch a PyTorch training run without changing it.

Copy this file beside train.py and add a few lines:

    import observability as obs

    obs.init(config=vars(args))
    obs.watch(model, optimizer=opt, scheduler=scheduler)
    step = 0
    step = obs.resume(step=step)                     # puts a killed run back where it was
    for epoch in range(1, epochs + 1):
        if obs.skip_epoch(epoch): continue
        for xb, yb in loader:
            if obs.skip_batch(): continue
            ...
            obs.step(step, loss=loss, batch=xb)      # last line of each optimizer step
        obs.validation(val_loss)                     # after each evaluation
    obs.finish()

What a run leaves behind, beside the script:

    logs/tb/<run>/                       TensorBoard events
    out/<run>/
        metrics.ndjson                   every record, a line each; everything else follows from it
        config.json  run_manifest.json   what was run, on what
        training.log  results.json       evaluations and events; how it ended
        checkpoints/step_00000123/       what a resume needs, where saving is on
        plots/latest.png                 the curves, where matplotlib is installed

    python observability.py summarize|verify|diff|plot|tb|… --help   (needs observability_tools.py)

What it promises: it draws no random number, reads no batch, runs no forward, sets no flag and never
waits for the device; a full disk ends the metrics, not the training; a SIGKILL loses no step; and a
resume is exact, or says beforehand why it will not be.
It needs the standard library, and torch only where the training already has it.

Part I records and runs always. Part II, checkpoints, runs where saving or resuming is on.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import copy
import ctypes
import dis
import errno
import functools
import io
import itertools
import json
import linecache
import math
import mmap
import numbers
import operator
import os
import pickle
import platform
import random
import re
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import types
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

try:
    import fcntl
except ImportError:  # Windows, where a live run is then not told from a dead one
    fcntl = None  # type: ignore[assignment]

__all__ = ["CheckpointError", "ObservabilityError", "Run", "init", "resume", "skip_epoch", "watch"]
__all__ += ["add_arguments", "ended", "finish", "log", "save", "skip_batch", "step", "validation"]
__all__ += ["latest_ckpt", "read_run"]

SCHEMA = 1


P = ParamSpec("P")
R = TypeVar("R")


class ObservabilityError(Exception):
    """Base of every error this module raises on purpose; none is raised into the training."""


class RunError(ObservabilityError):
    """A run directory is missing, in use, or of a newer schema than this file knows."""


class CheckpointError(ObservabilityError):
    """A wanted resume cannot be; only resume(), or skip_epoch() in its place, raises it."""


class DamageError(CheckpointError):
    """A file is not what was written. One that cannot be read is an OSError instead."""


_said: set[str] = set()


def warn_once(message: str, about: str = "") -> None:
    """To stderr, once for each message, or for all messages about the same thing."""
    if (about or message) not in _said:
        _said.add(about or message)
        say(message)


def say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed
        sys.stderr.write(f"observability: {redacted(message)}\n")


def fenced(method: Callable[P, R]) -> Callable[P, R | None]:
    """A call that cannot raise into the training loop, whatever it is handed."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # strangers' objects, the disk, and our own mistakes
            name = getattr(method, "__name__", method)
            warn_once(f"{name}() failed and the training goes on: {error!r}")
            return None

    return call


# ==================================================================================================
# Part I: recording
# ==================================================================================================

# --- The run --------------------------------------------------------------------------------------


class Run:
    """One training run; the module's functions are its methods, on the run that `init` opened.

    Args:
        run_name: its directory in `out_dir`, or the next free one of that family, `name-2`, …;
            by default a timestamp and the commit.
        config: hyperparameters: a dict, dataclass or Namespace. Secrets are redacted.
        dataset: what the script wants said of its data, in config.json.
        enabled: False, or `OBS_DISABLE=1`, makes every call do nothing.
        settings: the fields of `Settings` and `SaveSettings`.
    """

    def __init__(
        self,
        run_name: str | None = None,
        *,
        config: object = None,
        dataset: object = None,
        enabled: bool = True,
        **settings: Any,
    ) -> None:
        self.settings, self.saving = resolve_settings(settings)
        self.global_step = 0  # the script's own number of the latest step
        self.steps = 0  # optimizer steps, with those before a resume
        self.home: RunDirectory | None = None
        self.header: dict[str, Any] = {"models": []}  # for config.json
        self.watched: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        self.curve = Curve()
        self.recorder = Recorder(self.settings, process_place()[0], self.curve)
        self.listeners: list[Any] = []
        self.optimizers = OptimizerHooks()
        self._pace = Pace()
        self._checkpointer: Checkpointer | None = None
        self._asked: list[Asked] = []  # by resume(), where none was to save
        self._state = "off"  # then waiting (for resume), open, passing (a completed run), closed
        if enabled and os.environ.get("OBS_DISABLE", "0") in ("", "0"):
            _runs.add(self)
            self._begin(run_name, config, dataset)

    @property
    def dir(self) -> Path | None:
        """The run's directory; None where it has none, or not yet."""
        return self.home.path if self.home else None

    @property
    def epoch(self) -> int | None:
        return self._pace.epoch

    @property
    def name(self) -> str:
        return self.home.path.name if self.home else ""

    @fenced
    def _begin(self, name: str | None, config: object, dataset: object) -> None:
        family = safe_name(name)
        self._state = "waiting"
        self.header |= {"family": family, "config": to_json(config), "dataset": to_json(dataset)}
        if self.saving.on:
            self._checkpointer = Checkpointer(self)
        if self._checkpointer is None or not self._checkpointer.reserve():
            self._open()

    @fenced
    def _open(self, resumed: Mapping[str, Any] | None = None) -> None:
        """Begin to record, in the directory reserved by a resume or in a new one."""
        self._state = "open"
        if self.recorder.rank:
            return
        event = "resume" if resumed else "start"
        tags: dict[str, Any] = {"event": event}
        try:
            self.home = self.home or RunDirectory.create(self.settings, self.header)
            tags |= self.home.describe(resumed)
        except (OSError, RunError) as error:
            self.recorder.degrade("the run directory", error)
        self.recorder.open(self.home, tags, resumed, self._tick)
        if self._checkpointer is not None:
            self._checkpointer.opened()
        atexit.register(self._at_exit)
        say(f"{event} at step {self.global_step}: recording in {self.dir}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("completed" if kind is None else f"failed: {kind.__name__}")

    def add_listener(self, listener: Any) -> None:
        """Have `listener` told of what happens, on the loop's thread; each method is optional.

        watched(run), stepped(step, metrics), evaluating(), evaluated(step, metrics), saving(step)
        -> what the checkpoint is to keep for it, resumed(kept), finishing(status).
        """
        self.listeners.append(listener)

    def tell(self, what: str, *facts: Any) -> None:
        for listener in self.listeners:
            if hasattr(listener, what):
                fenced(getattr(listener, what))(*facts)

    # What the script calls.

    @fenced
    def watch(
        self,
        /,
        *models: Any,
        optimizer: Any = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        generator: Any = None,
    ) -> None:
        """Name what is trained; each argument is one object or a sequence of them. Read only.

        Generators are torch's, numpy's or Python's own `random.Random`.
        """
        if self._state in ("off", "closed"):
            return
        models = tuple(model for each in models for model in several(each))
        before = len(self.watched["model"])
        given = dict(zip(KINDS, (models, optimizer, scheduler, scaler, loader, generator)))
        for kind, things in given.items():
            known = {id(thing) for thing in self.watched[kind]}
            self.watched[kind] += [t for t in map(unwrapped, several(things)) if id(t) not in known]
        for each in several(optimizer):
            self.optimizers.follow(each)
        for model in self.watched["model"][before:]:
            count = parameter_count(model)
            self.header["models"].append({"class": type(model).__name__, "parameters": count})
            self.recorder.event(
                "watch", self.global_step, model=type(model).__name__, parameters=count
            )
        if self.home is not None and self._state == "open":
            self.home.save_config(self.header)
        self._pace.mark = time.perf_counter()
        self.tell("watched", self)

    def resume(self, /, **defaults: Any) -> Any:
        """Before the loop: put back what a checkpoint holds, where the run is to go on from one.

        Args:
            defaults: the loop-carried locals, as the script begins with them.
        Returns: their values in order, as given or as saved; of a single one, the value itself.
        Raises:
            CheckpointError: the resume that was asked for cannot be.
        """
        self._put_back()
        if self._checkpointer is None:
            self._asked.append(([*defaults], caller().f_code, caller().f_lineno))
            return in_order(defaults)
        return in_order(self._checkpointer.locals(defaults))

    def _put_back(self) -> None:
        """By the first of resume() and skip_epoch(), the only calls that raise: no step is lost."""
        checkpointer = self._checkpointer
        if checkpointer is None or checkpointer.is_back:
            return None
        state = checkpointer.put_back()
        if state is None:
            return self._open() if self._state == "waiting" else fenced(checkpointer.tell_ranks)()
        self.global_step, self.steps = state["global_step"], state["steps"]
        self._pace.tokens = state["tokens"]
        if not checkpointer.completed:
            return self._open(state)
        self._state = "passing"
        checkpointer.signals.release(None)  # there is nothing to save
        fenced(checkpointer.tell_ranks)()
        return say(f"{self.dir} has completed at step {self.global_step}; it is left unchanged")

    def step(
        self,
        /,
        step: Any = None,
        loss: Any = None,
        batch: Any = None,
        *,
        tokens: Any = None,
        samples: Any = None,
        batches: int = 1,
        carry: Mapping[str, Any] | None = None,
        last: bool = False,
        **metrics: Any,
    ) -> None:
        """Record one optimizer step; the last line of an iteration that made one.

        Args:
            step: its number; without it the run counts.
            loss: a number or a one-element tensor; a CUDA tensor is not waited for.
            batch: what was trained on, for the rates: its shape is looked at, nothing is read.
            tokens, samples: how many this step consumed, where the batch does not tell.
            batches: of how many like that one the step accumulated the gradients.
            carry: loop-carried locals that `resume` was asked for and that this call cannot see.
            last: the loop breaks after this step; a resumed run then leaves it at `ended`.
            metrics: further numbers or one-element tensors. `lr` is the one that the step used.
        """
        if self._state != "open" and not self._records("step"):
            return
        try:
            now, pace = time.perf_counter(), self._pace
            if step.__class__ is not int:
                step = whole_number("step", step, self.global_step + 1)
            if step < self.global_step:
                warn_once(f"step {step} came after step {self.global_step}; both stand", "order")
            record = {} if loss is None else {"loss/train": loss}
            record.update(self.optimizers.lrs)
            if batch is not None or samples is not None or tokens.__class__ is not int:
                whole = pace.batches < 2 or batches != 1  # else it is not all that was trained on
                tokens, samples = sizes(batch if whole else None, batches, tokens, samples)
            if tokens is not None:
                pace.tokens += tokens
            if pace.mark is not None and now > pace.mark:
                if tokens is not None:
                    record["speed/tokens_per_sec_step"] = tokens / (now - pace.mark)
                if samples is not None:
                    record["speed/samples_per_sec_step"] = samples / (now - pace.mark)
            record.update(metrics)
            if pace.held or not pace.place:
                self._date_held(step)
            self.global_step, pace.mark, pace.batches = step, now, 0
            self.steps, self.optimizers.stepped = self.steps + 1, False
            self.recorder.record("train", step, record)
            self.tell("stepped", step, record)
        except Exception as error:  # whatever the caller handed in: the training goes on
            warn_once(f"step() failed and the training goes on: {error!r}")
        if self._checkpointer is not None:
            self._obey(self._checkpointer.after_step(carry, last))

    @fenced
    def save(self, /) -> None:
        """Ask for a checkpoint: at the next step(), or at the end of the epoch."""
        if self._records("save"):
            if self._checkpointer is None:
                self._checkpointer = Checkpointer(self).begin_late(self._asked, self._pace)
            self._checkpointer.wanted = "the script"

    @fenced
    def validation(
        self, /, loss: Any, *, step: Any = None, epoch: int | None = None, **metrics: Any
    ) -> None:
        """Record one evaluation, at the step under way or just made unless another is given.

        Under way is one where the optimizer has stepped and step() is yet to come, which writes
        it; without a hook that tells, the lines of the two calls do. `loss` is a number, a
        one-element tensor, or what evaluate() returned: of a dict the entry named val, val_loss or
        loss, else the first that sounds like one; of a tuple its first.
        """
        if not self._records("validation"):
            return
        self.tell("evaluating")
        epoch = whole_number("epoch", epoch, self.epoch)
        if epoch is not None and epoch != self.epoch:
            self._begin_epoch(epoch)
        loss, others = split_loss(loss)
        # Part of this iteration's time went into the evaluation: the step's own is not known.
        self._pace.mark = None
        comes_later = getattr(loss, "is_cuda", False) and loss.numel() == 1
        loss = as_now(loss)
        number = loss if comes_later else as_number("loss/val_step", loss)
        record = {f"{name}/val": value for name, value in {**others, **metrics}.items()}
        if number is None:
            self._record("eval", step, record)
            return
        self._pace.epoch_loss = loss
        evaluation = self.curve.expect(self.global_step, self.epoch, self.weights_seen(), number)
        if not self.optimizers.steps and self._checkpointer and self._checkpointer.in_iteration():
            evaluation.weights += 0.5  # no hook tells whether they are those of the step before
        self._record("eval", step, {"loss/val_step": loss, **record}, evaluation)
        if self._checkpointer is not None:
            self._checkpointer.evaluated(evaluation)

    def _record(
        self, phase: str, step: Any, metrics: Mapping[str, Any], of: Evaluation | None = None
    ) -> None:
        """Now, or by the call that tells of which step it is."""
        at, place, pace = whole_number("step", step, None), None, self._pace
        if at is None and phase == "eval" and self.optimizers.hooks:
            at = None if self.optimizers.stepped else self.global_step
        elif at is None:
            place = script_places()
            is_behind = self._state == "waiting" or follows(place, pace.place)
            at = self.global_step if is_behind else None
            if len(pace.held) > 999 or (
                not self.steps and place in [each[-1] for each in pace.held]
            ):
                self._date_held()  # a loop goes on that never calls step()
        if at is not None and not (of and pace.held):  # losses come in their order
            return self._write(phase, at, metrics, of)
        pace.held.append((phase, at, {n: as_now(v) for n, v in metrics.items()}, of, place))
        return None

    def _write(
        self, phase: str, at: int, metrics: Mapping[str, Any], of: Evaluation | None
    ) -> None:
        if metrics:
            self.recorder.record(phase, at, metrics)
        if of is not None:
            of.step = at
            self.tell("evaluated", at, metrics)

    @fenced
    def _date_held(self, step: int | None = None) -> None:
        """By step(), with its number, or by what tells that none comes."""
        held, self._pace.held = self._pace.held, []
        called_at, latest = [] if step is None else script_places(), self.global_step
        under_way = latest + self.optimizers.stepped if step is None else step
        for phase, at, metrics, of, place in held:
            if at is None:
                at = under_way if place is None or follows(called_at, place) else latest
            self._write(phase, at, metrics, of)
        self._pace.place = called_at or self._pace.place

    def progress(self) -> dict[str, Any]:
        """For state.json."""
        return {"tokens": self._pace.tokens, "hyperparameters": self.header["config"]}

    def settle(self) -> None:
        """Wait until a checkpoint that is being written is durable."""
        if self._checkpointer is not None:
            self._checkpointer.settle()

    def is_passing(self) -> bool:
        """Whether a resumed run is on its way back to its place."""
        return self._checkpointer is not None and self._checkpointer.is_passing()

    def weights_seen(self) -> int:
        """Tells one state of the weights from the next."""
        return self.optimizers.steps or -self.steps

    @fenced
    def log(self, /, metrics: Mapping[str, Any], step: Any = None) -> None:
        """Record anything else, any time: numbers or one-element tensors by name.

        A list, dict or text is kept in the record's tags. What comes before step() in an iteration
        is of its step, which writes it.
        """
        if self._records("log"):
            self._record("train", step, metrics)

    def skip_epoch(self, /, epoch: int | None = None) -> bool:
        """First line of an epoch's loop: `if obs.skip_epoch(epoch): continue`. Names the epoch.

        Raises CheckpointError where resume() would, and has not been called.
        """
        self._put_back()
        self._date_held()
        if self._checkpointer is not None:
            self._obey(self._checkpointer.between_epochs())
        return bool(self._enter_epoch(epoch))

    @fenced
    def _enter_epoch(self, epoch: int | None) -> bool:
        number = whole_number("epoch", epoch, (self.epoch or 0) + 1)
        skip = self._checkpointer is not None and self._checkpointer.skip_epoch(number)
        if self._records("skip_epoch"):
            self._begin_epoch(number)
            self._pace.mark, self._pace.batches = time.perf_counter(), 0
            self._pace.epoch_loss = self.curve.epoch_losses.pop(number, None)
        return skip

    def skip_batch(self, /, *_: object) -> bool:
        """First line of the loop over batches: `if obs.skip_batch(): continue`."""
        self._pace.batches += 1
        self._pace.passed += 1
        if self._checkpointer is None:
            return False
        self._obey(self._checkpointer.before_iteration())
        return self._checkpointer is not None and self._checkpointer.skip_batch()

    @fenced
    def ended(self, /) -> bool:
        """First line of a loop that breaks after its step: `if obs.ended(): break`."""
        return self._checkpointer is not None and self._checkpointer.ended()

    def finish(self, /, status: str = "completed", **results: Any) -> None:
        """Write out what is left, results.json too, and close; a second call does nothing."""
        completed = not str(status).startswith(("failed", "unfinished", "signal", "superseded"))
        if completed and self._state == "waiting":
            self._records("step")  # or all that is held would be lost
        self._date_held()
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            fenced(checkpointer.finish)(completed)
        if self._state == "open":
            self._close(status, completed, results)
        elif self.home is not None:
            self.home.unlock()
        self._state = "off" if self._state == "off" else "closed"
        if checkpointer is not None:
            checkpointer.signals.release(checkpointer.signals.number)

    def _records(self, call: str) -> bool:
        """Whether a call is to be recorded; of one that is not, say so."""
        if self._state == "closed":
            warn_once(f"{call}() after finish(): it is not recorded")
        elif call == "step" and self._checkpointer and self._state in ("waiting", "passing"):
            if self._state == "passing":
                say(f"{self.dir} had completed, and the script goes on: the rest is another run")
            else:
                say("the run was to resume, but the script never calls resume(): it begins anew")
            self._open(self._checkpointer.begin_anew())
        return self._state in ("open", "waiting")

    def _begin_epoch(self, epoch: int) -> None:
        self._end_epoch()
        self._pace.epoch, self._pace.passed = epoch, 0
        self._pace.epoch_began = (time.perf_counter(), self._pace.tokens)

    def _end_epoch(self) -> None:
        """One point per epoch: its last validation loss, and its speed with everything in it."""
        record: dict[str, Any] = {}
        pace, (began, tokens) = self._pace, self._pace.epoch_began
        if pace.epoch_loss is not None:
            record["loss/val"] = pace.epoch_loss
        if began and pace.tokens > tokens:
            record["speed/tokens_per_sec"] = (pace.tokens - tokens) / (time.perf_counter() - began)
        if record and self.epoch is not None:
            self.recorder.record("eval", self.global_step, record, epoch=self.epoch)
        pace.epoch_loss = None

    # What runs beside the loop, and the end.

    def _tick(self, now: float) -> None:
        if self.home is not None:
            self.home.tick(now, self.settings.plot_interval)
        if self._checkpointer is not None:
            self._checkpointer.signals.tick(now)

    def _obey(self, number: int | None) -> None:
        """End as the script would have by that signal, now that the step is saved."""
        if number is not None and self._checkpointer is not None:
            signals = self._checkpointer.signals
            if signals.kills(number):
                self._close(f"signal {number}", False, {})
            signals.release(number)

    def forget(self) -> None:
        """In a forked worker: the run is its parent's, and so is the lock that says it lives."""
        self._state = "off"
        if self.home is not None:
            self.home.unlock(forked=True)
        if self._checkpointer is not None:
            self._checkpointer.signals.release(None)
            self._checkpointer = None

    @fenced
    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)
        self.finish("unfinished" if error is None else f"failed: {error!r}")

    @fenced
    def _close(self, status: str, completed: bool, results: Mapping[str, Any]) -> None:
        atexit.unregister(self._at_exit)
        self._date_held()
        self.optimizers.remove()
        self.tell("finishing", status)
        if completed:  # of an epoch that was interrupted the last evaluation is not its loss
            self._end_epoch()
        self._state, status = "closed", redacted(status)
        facts = {"status": status, **self.recorder.close(status, self.global_step)}
        if self.home is None:
            return None
        if not completed and not self.curve.recorded:
            return self.home.discard()  # a start that failed leaves no empty run behind
        facts |= {"steps": self.steps, "last_step": self.global_step, **self.curve.results()}
        self.home.save_results(facts, results)
        if facts["degraded"]:
            say(f"at the end of the run these were off: {', '.join(facts['degraded'])}")
        say(f"{status} at step {self.global_step}: {self.dir}")
        self.home.unlock()
        _completed.update([self.dir] if status == "completed" else [])
        return self.home.plot(last=True) if self.settings.plot_interval > 0 else None


Place = tuple[types.CodeType, int]  # a function of the script, and a line of it
# A record that waits for its step: phase, step where it is known, metrics, evaluation, and where
# it was called, None where it is of the step under way.
Held = tuple[str, "int | None", Mapping[str, Any], "Evaluation | None", "list[Place] | None"]


class Pace:
    """Where the loop is, what the rates divide by, and what an epoch has come to."""

    def __init__(self) -> None:
        self.mark: float | None = None  # perf_counter() when the current iteration began
        self.batches = 0  # that skip_batch() has seen since the last step
        self.passed = 0  # and since the epoch's beginning
        self.tokens = 0
        self.epoch: int | None = None
        self.epoch_began = (0.0, 0)  # perf_counter(), tokens
        self.epoch_loss: Any = None
        self.held: list[Held] = []
        self.place: list[Place] = []  # where step() was called, when last asked


class OptimizerHooks:
    """By the hook that torch has for each optimizer: the rates a step used, and that it stepped."""

    def __init__(self) -> None:
        self.lrs: dict[str, Any] = {}
        self.stepped = False  # since the last call of step()
        self.steps = 0
        self.hooks: dict[int, Any] = {}

    def follow(self, optimizer: Any) -> None:
        attributes = getattr(optimizer, "__dict__", {}).values()
        parts = [each for value in attributes for each in several(value)]
        if within := [each for each in parts if hasattr(type(each), "register_step_post_hook")]:
            for each in within:  # it is a wrapper, that steps them
                self.follow(each)
            return
        name = f"lr/{len(self.hooks)}" if self.hooks else "lr"

        def note(optimizer: Any, *_: object) -> None:
            self.stepped = True
            self.steps += 1
            self.lrs[name] = as_number(name, optimizer.param_groups[0]["lr"])

        if not hasattr(optimizer, "register_step_post_hook"):
            warn_once(f"{name} is not recorded, {type(optimizer).__name__} takes no step hook")
        elif id(optimizer) not in self.hooks:
            self.hooks[id(optimizer)] = register_hook(optimizer.register_step_post_hook, note)

    def remove(self) -> None:
        for hook in self.hooks.values():
            hook.remove()


def register_hook(register: Callable[[Any], Any], hook: Any) -> Any:
    """A handle of torch's, without taking one of the numbers that the script's hooks have.

    They are keys in each module that it pickles. Ours are far below zero, and no two hooks that
    are registered at once have the same, also not with two copies of this file.
    """
    handles: Any = sys.modules["torch"].utils.hooks.RemovableHandle
    next_id, handles.next_id = handles.next_id, -id(hook)
    try:
        return register(hook)
    finally:
        handles.next_id = next_id


def sizes(batch: Any, batches: Any, tokens: Any, samples: Any) -> tuple[Any, Any]:
    """Tokens and samples of a batch, by its shape: int32 or int64 in two dimensions are tokens."""
    if tokens is not None or samples is not None:
        return whole_number("tokens", tokens, None), whole_number("samples", samples, None)
    if isinstance(batch, Mapping):
        tensors = (value for value in batch.values() if hasattr(value, "shape"))
        batch = batch.get("input_ids", next(tensors, None))
    elif isinstance(batch, list | tuple):
        batch = next(iter(batch), None)
    if not (shape := getattr(batch, "shape", None)):
        return None, None
    if len(shape) == 2 and str(batch.dtype).rpartition(".")[2] in ("int32", "int64"):
        return shape[0] * shape[1] * batches, None
    return None, shape[0] * batches


_LOSSES = re.compile(r"loss|nll|ppl|perplexity|bpb|error|mse", re.I)


def split_loss(given: Any) -> tuple[Any, dict[str, Any]]:
    """The loss, and the rest of what an evaluate() returned."""
    if isinstance(given, list | tuple):
        given = {"loss": next(iter(given), None), **dict(zip(map(str, range(1, 99)), given[1:]))}
    if not isinstance(given, Mapping):
        return given, {}
    like_one = (name for name in given if _LOSSES.search(str(name)))
    loss = next((name for name in ("val", "val_loss", "loss", *like_one) if name in given), None)
    others = {str(name): value for name, value in given.items() if name != loss}
    if "loss" in others:  # beside one named val: loss/val is the curve of the epochs
        others["other_loss"] = others.pop("loss")
    return given.get(loss), others


def parameter_count(model: Any) -> int | None:
    """None for a lazy model that knows no shape yet, and for what has no parameters."""
    try:
        return int(sum(parameter.numel() for parameter in model.parameters()))
    except (AttributeError, ValueError):
        return None


def as_now(value: Any) -> Any:
    """A copy of what the script may go on adding to."""
    if hasattr(value, "detach"):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, list | dict) else value


def whole_number(name: str, value: Any, otherwise: R) -> int | R:
    """A count from whatever counts: an int of any library, a float that is whole."""
    try:
        if value is not None and not getattr(value, "is_cuda", False) and int(value) == value:
            return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    if value is not None:
        warn_once(f"{name}={shown(value)} is no whole number, and is passed over", name)
    return otherwise


def in_order(values: Mapping[str, Any]) -> Any:
    """As an assignment takes them: a tuple, of a single one the value itself."""
    return next(iter(values.values())) if len(values) == 1 else tuple(values.values())


def several(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def process_place() -> tuple[int, int]:
    """Rank and world size: by torch.distributed where it is initialised, else by environment."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank()), int(distributed.get_world_size())
    return env_int("RANK", 0), env_int("WORLD_SIZE", 1)


def env_int(name: str, otherwise: int) -> int:
    said = os.environ.get(name) or str(otherwise)
    if not said.isdecimal():
        warn_once(f"{name}={said!r} is no number; it counts as {otherwise}")
    return int(said) if said.isdecimal() else otherwise


# --- Where in the script --------------------------------------------------------------------------


def caller() -> types.FrameType:
    """The frame of the script that called into this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def script_frames(root: Any = None) -> list[types.FrameType]:
    """From the script's function that called us up to `root`, or to its module."""
    frame: types.FrameType | None = caller()
    frames: list[types.FrameType] = []
    while frame is not None:
        frames.append(frame)
        is_last = frame.f_code is root or frame.f_code.co_name.startswith(("<m", "<c"))
        frame = None if is_last else frame.f_back
    return frames


def script_places() -> list[Place]:
    return [(frame.f_code, frame.f_lineno) for frame in reversed(script_frames())]


def follows(later: Sequence[Place], earlier: Sequence[Place]) -> bool:
    """Whether one call comes after another in one iteration, by the lines at which they part."""
    for depth, (at, before) in enumerate(zip(later, earlier)):
        if at != before:
            [around, *within] = (loops_around(*place) for place in later[depth:])
            is_same = all(first <= before[1] for first in around[-1:]) and not any(within)
            return is_same and at[0] is before[0] and at[1] > before[1]
    return False


_LOOPS = (ast.For, ast.While)


@functools.lru_cache(1000)
def loops_around(code: types.CodeType, line: int) -> list[int]:
    """The first lines of that function's loops around a line, the innermost's last."""
    loops = (n for n in ast.walk(parsed_file(code.co_filename)) if isinstance(n, _LOOPS))
    around = [loop.lineno for loop in loops if loop.lineno <= line <= (loop.end_lineno or 0)]
    return [first for first in around if first >= code.co_firstlineno]


def parsed_file(name: str) -> Any:
    with contextlib.suppress(SyntaxError, ValueError):
        return ast.parse("".join(linecache.getlines(name)))
    return ast.Module([], [])


# --- Settings -------------------------------------------------------------------------------------


@dataclass
class Settings:
    """What `init` takes beside its own arguments.

    An argument goes before its variable, `OBS_` and the name in capitals, and that before the
    default. Relative paths start at the script's folder.
    """

    out_dir: str = "out"
    tb_dir: str = "logs/tb"
    tensorboard: bool = True
    wandb: bool = False  # WANDB_MODE=offline or online turns it on too
    gpu: bool = False  # gpu_* keys by NVML; CODEX_MONITORING_ENABLE_GPU=1 turns it on too
    metrics_filename: str = "metrics.ndjson"  # another one is a stream beside the run's own
    drain_interval: float = 0.5  # seconds between two hand-overs to TensorBoard and W&B
    system_interval: float = 10.0  # seconds between two system records, 0 for none
    plot_interval: float = 300.0  # seconds between two drawings of the curves, 0 for none
    shard_bytes: int = 64 << 20  # after which the journal goes on in a new file, 0 for never
    shard_age: float = 0.0  # seconds after which it does, 0 for never
    close_timeout: float = 5.0  # seconds that finish() may take, without a checkpoint


@dataclass
class SaveSettings:
    """What `init` takes for checkpoints, in the same way."""

    save_interval: str = "0"  # optimizer steps between two checkpoints, or auto; 0 is off
    keep_last: int = 3  # checkpoints, beside the best and the one resumed from
    save_best: bool = True  # one more checkpoint for each evaluation that beats all before it
    resume: str = "never"  # or auto, or the directory of a run or of a checkpoint
    ckpt_dir: str = ""  # where checkpoints lie; by default in the run's directory
    weights: str = ""  # a file for the weights alone, as of the latest checkpoint
    save_timeout: float = 120.0  # seconds that the last checkpoint may take

    @property
    def on(self) -> bool:
        return self.save_interval not in ("", "0") or self.resume not in ("", "never")


_from_arguments: dict[str, Any] = {}  # settings that came by way of the command line
# Without a prefix, as the seed's scripts and the runbook name them.
_OTHER_NAMES = {
    "save_interval": "SAVE_INTERVAL",
    "keep_last": "KEEP_LAST",
    "gpu": "CODEX_MONITORING_ENABLE_GPU",
}


def resolve_settings(given: Mapping[str, Any]) -> tuple[Settings, SaveSettings]:
    """Bad names and values are said, and the defaults stand."""
    both = Settings(), SaveSettings()
    both[0].wandb = os.environ.get("WANDB_MODE") in ("offline", "online", "shared")
    kinds: dict[str, Any] = {f.name: (part, type(f.default)) for part in both for f in fields(part)}
    if unknown := sorted(set(given) - set(kinds)):
        warn_once(f"init() has no setting {', '.join(unknown)}; it has {', '.join(kinds)}")
    known = {"OBS_DISABLE", *(f"OBS_{name.upper()}" for name in kinds)}
    if unknown := sorted(name for name in os.environ if name[:4] == "OBS_" and name not in known):
        warn_once(f"{', '.join(unknown)}: no such setting; there are {', '.join(sorted(known))}")
    for name, (part, kind) in kinds.items():
        other = os.environ.get(_OTHER_NAMES.get(name, ""))
        said = _from_arguments.get(name, os.environ.get(f"OBS_{name.upper()}") or other)
        value = said if given.get(name) is None else given[name]
        try:
            setattr(part, name, getattr(part, name) if value is None else setting_of(value, kind))
        except (TypeError, ValueError):
            warn_once(f"setting {name}={shown(value)} is no {kind.__name__}; the default stands")
    both[0].metrics_filename = safe_name(both[0].metrics_filename) or Settings.metrics_filename
    return both


def setting_of(value: Any, kind: type) -> Any:
    """A setting from an argument or a variable. Raises TypeError, ValueError."""
    if kind is bool and isinstance(value, str):
        return value.lower() not in ("", "0", "false", "no", "off")
    number = kind(value)
    if kind in (int, float) and not 0 <= number <= 1e12:
        raise ValueError(value)
    return number


def add_arguments(parser: Any) -> None:
    """Give an argparse parser --resume, --ckpt_dir, --keep_last_checkpoints, --save_interval."""

    def add(option: str, setting: str, text: str, kind: type = str, **more: Any) -> None:
        def argument(said: str) -> Any:
            _from_arguments[setting] = kind(said)
            return _from_arguments[setting]

        if option not in parser._option_string_actions:  # else the script has its own
            parser.add_argument(option, type=argument, metavar=setting.upper(), help=text, **more)

    a_run = "auto, never, or a run's or a checkpoint's directory"
    add("--resume", "resume", a_run, nargs="?", const="auto")
    add("--ckpt_dir", "ckpt_dir", "where checkpoints lie")
    add("--keep_last_checkpoints", "keep_last", "how many are kept", int)
    add("--save_interval", "save_interval", "optimizer steps between two, or auto")


# --- Facade ---------------------------------------------------------------------------------------

_run: Run | None = None
_completed: set[Path | None] = set()  # runs, by this process
_runs: weakref.WeakSet[Run] = weakref.WeakSet()


@functools.wraps(Run, updated=())
def init(*args: Any, **kwargs: Any) -> Run:
    """Open a run for the functions below; one that is still open is finished first."""
    global _run, step
    if _run is not None:
        _run.finish("superseded")
    _run = fenced(Run)(*args, **kwargs) or Run(enabled=False)
    step = _run.step  # handing the arguments on costs 8 us beside a real step
    return _run


def current_run() -> Run | None:
    """The run that `init` opened last."""
    return _run


def _on_the_run(method: Callable[Concatenate[Run, P], R]) -> Callable[P, R | None]:
    name = method.__name__

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        if _run is not None:
            return method(_run, *args, **kwargs)
        if name != "finish":
            warn_once(f"{name}() before init(): it is not recorded")
        return None

    return call


def resume(**defaults: Any) -> Any:
    """The loop's locals in their order, as a checkpoint has them or as given: see `Run.resume`."""
    return in_order(defaults) if _run is None else _run.resume(**defaults)


watch = _on_the_run(Run.watch)
step = _on_the_run(Run.step)
validation = _on_the_run(Run.validation)
skip_epoch = _on_the_run(Run.skip_epoch)
skip_batch = _on_the_run(Run.skip_batch)
ended = _on_the_run(Run.ended)
save = _on_the_run(Run.save)
log = _on_the_run(Run.log)
finish = _on_the_run(Run.finish)


def _forget_all() -> None:
    for run in list(_runs):
        run.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def main(arguments: Sequence[str] | None = None) -> int:
    """The commands, which are a file of their own."""
    sys.path.append(str(Path(__file__).resolve().parent))
    try:
        import observability_tools as tools
    except ModuleNotFoundError:
        say("for the commands copy observability_tools.py beside this file")
        return 2
    return tools.main(arguments)


# --- From a value to the journal ------------------------------------------------------------------


class Record(NamedTuple):
    """One line of the journal."""

    form: Form
    seq: int
    wall: float
    step: int
    values: Sequence[float]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Record:
        """From what `read_run` gives."""
        form = form_of(json.dumps([record["tags"], *record["metrics"]]))
        values = [float(value) for value in record["metrics"].values()]
        return cls(form, record["seq"], record["time"], record["step"], values)

    def line(self) -> bytes:
        return self.form.line(*self[1:], sum(self.values))


class Form:
    """How records of the same tags and names are written, worked out once from the two."""

    def __init__(self, key: str) -> None:
        self.tags, *names = json.loads(key)
        self.names: tuple[str, ...] = tuple(names)
        self.phase = self.tags["phase"]
        metrics = ",".join(json.dumps(n).replace("%", "%%") + ":%r" for n in names)
        tags = json.dumps(self.tags).replace("%", "%%")
        self._template = f'{{"schema":{SCHEMA},"seq":%d,"time":%.6f,"step":%d,'
        self._template += f'"metrics":{{{metrics}}},"tags":{tags}'
        self.event = functools.cache(functools.partial(EventForm, self.names))  # by step's bytes

    def line(
        self, seq: int, wall: float, step: int, values: Sequence[float], total: float
    ) -> bytes:
        """As strict JSON; the template is four times faster than json.dumps."""
        # The total is finite only where every value is, and one test is cheaper than many.
        if not math.isfinite(total):
            values = [v if math.isfinite(v) else Quoted(v) for v in values]
        body = (self._template % (seq, wall, step, *values)).encode()
        return b'%b,"crc":%d}\n' % (body, zlib.crc32(body))


class Quoted(float):
    """JSON has no NaN and no infinities: they are the strings "NaN", "Infinity", "-Infinity"."""

    def __repr__(self) -> str:
        return f'"{json.dumps(float(self))}"'


form_of = functools.lru_cache(1000)(Form)  # a script may make up names without end


class Recorder:
    """Gives each value its line in the journal, and hands the lines to the other sinks.

    The line is in the kernel when record() returns, so a SIGKILL loses none. What is still on a
    device follows when it has arrived, and with it, in their order, what was recorded since.
    """

    BACKLOG = 100_000  # records that wait for a sink that hangs

    def __init__(self, settings: Settings, rank: int, curve: Curve) -> None:
        self.seq, self.rank = 0, rank
        self._settings, self._curve = settings, curve
        self._degraded: dict[str, str] = {}  # what broke, and how
        self._journal: Journal | None = None
        self._sinks: list[Sink] = []
        self._forms: dict[tuple[str, ...], Form] = {}
        self._pending: deque[tuple[Form, int, float, int, list[Any]]] = deque()
        # What is recorded before the journal is open; None from then on.
        self._held: deque[tuple[Any, ...]] | None = deque(maxlen=0 if rank else 10_000)
        self._queue: deque[tuple[Form, int, float, int, list[float]]] = deque(maxlen=self.BACKLOG)
        self._lock = threading.RLock()  # reentrant, for a signal handler that records
        self._draining = threading.Lock()
        self._stop = threading.Event()
        self._timer: threading.Thread | None = None

    def open(
        self,
        home: RunDirectory | None,
        tags: Mapping[str, Any],
        resumed: Mapping[str, Any] | None,
        tick: Callable[[float], None],
    ) -> None:
        """Begin with the event that `tags` tell of; what was held comes after it."""
        held, self._held = self._held, None
        if home is not None:
            make = functools.partial(Journal, home.journal, self._settings)
            self._journal = self._attempt("the journal", make)
            if resumed is not None:
                self.seq = self._curve.go_on(home.path, resumed)
            self._add_sink("training.log", lambda: TrainingLog(home.path))
        if self._settings.tensorboard:
            directory = home.tb_dir if home else script_dir() / self._settings.tb_dir / stamp()
            earlier = read_run(home.path, until=self.seq) if home and resumed else ()
            self._add_sink("TensorBoard", lambda: TensorBoard(directory, earlier))
        if self._settings.wandb and home is not None:
            self._add_sink("W&B", lambda: WeightsAndBiases(home, resumed is not None))
        self.record("event", resumed["global_step"] if resumed else 0, {}, **tags)
        for phase, step, metrics, others in held or ():
            self.record(phase, step, metrics, **others)
        self._timer = threading.Thread(
            target=self._run_timer, name="observability", args=[tick], daemon=True
        )
        self._timer.start()

    def event(self, event: str, step: int, **facts: Any) -> None:
        short = {name: str(value)[:200] for name, value in facts.items()}
        self.record("event", step, {}, event=event, **short)

    def record(self, phase: str, step: int, metrics: Mapping[str, Any], **tags: Any) -> None:
        if self._pending:
            self.land()
        values = [v if v.__class__ is float else as_number(k, v) for k, v in metrics.items()]
        if None in values:
            metrics, values, tags = without_structures(metrics, values, tags)
        if self._held is not None:
            self._held.append((phase, step, dict(zip(metrics, values)), tags))
            return
        form = None if tags else self._forms.get((phase, *metrics))
        form = form or self._form(phase, metrics, tags)
        try:
            total = sum(values)
        except TypeError:  # one is still on its way from the device
            total = None
        wall = time.time()
        with self._lock:
            self.seq = seq = self.seq + 1
            if total is None or self._pending:
                self._pending.append((form, seq, wall, step, values))
            else:
                self._commit(form, seq, wall, step, values, total)

    def _form(self, phase: str, metrics: Mapping[str, Any], tags: Mapping[str, Any]) -> Form:
        everything, key = {"phase": phase, "rank": self.rank, **tags}, (phase, *metrics)
        form = form_of(json.dumps([everything, *map(str, metrics)]))
        if not tags and len(self._forms) < 1000:
            self._forms[key] = form
        return form

    def _commit(
        self, form: Form, seq: int, wall: float, step: int, values: list[float], total: float
    ) -> None:
        """From here on a SIGKILL does not lose the record."""
        if self._journal is not None:
            self._journal.write(form.line(seq, wall, step, values, total))
        self._queue.append((form, seq, wall, step, values))
        if form.phase == "eval" and form.names[:1] == ("loss/val_step",):
            self._curve.evaluated(values[0])

    def land(self) -> None:
        """Write what has arrived from the device. Never waits for it."""
        with self._lock:
            while self._pending and all_arrived(self._pending[0][-1]):
                form, seq, wall, step, values = self._pending.popleft()
                numbers = [v if v.__class__ is float else v.take() for v in values]
                self._commit(form, seq, wall, step, numbers, sum(numbers))

    # To the sinks, by a thread of its own.

    def _run_timer(self, tick: Callable[[float], None]) -> None:
        sampler = SystemSampler(self._settings)
        interval = min(max(0.001, self._settings.drain_interval), 3600.0)
        while True:
            now = time.monotonic()
            jobs: dict[str, Callable[[], None]] = {
                "the system record": functools.partial(self._sample, sampler, now),
                "what comes from the device": self.land,
                "the journal": self._keep_journal,
                "what the sinks get": self.drain,
                "the upkeep": functools.partial(tick, now),
            }
            for what, job in jobs.items():
                self._attempt(what, job)
            if self._stop.wait(interval):
                return

    def _sample(self, sampler: SystemSampler, now: float) -> None:
        if sampler.is_due(now):
            self.record("system", self._curve.last_step, sampler.sample())

    def _keep_journal(self) -> None:
        if self._journal is not None:
            with self._lock:
                self._journal.retry()
            self._journal.sync(time.monotonic())

    def drain(self) -> None:
        """Hand what has been recorded to the sinks, a slice at a time: each lets the loop run."""
        with self._draining:
            while self._queue:
                records = [Record(*self._queue.popleft()) for _ in range(min(64, len(self._queue)))]
                for record in records:
                    self._curve.take(record)
                self._hand_over(records)

    def _hand_over(self, records: list[Record]) -> None:
        for sink in list(self._sinks):
            self._attempt(type(sink).__name__, functools.partial(sink.write, records))
            if type(sink).__name__ in self._degraded:
                self._let_go(sink)

    def _let_go(self, sink: Sink) -> None:
        self._sinks.remove(sink)
        self._attempt(type(sink).__name__, sink.close)

    def _attempt(self, what: str, job: Callable[[], R]) -> R | None:
        try:
            return job()
        except Exception as error:  # a device, the disk, a stranger's package: the rest goes on
            self.degrade(what, error)
            return None

    def degrade(self, what: str, error: Exception) -> None:
        if what not in self._degraded:
            self._degraded[what] = redacted(repr(error))
            warn_once(f"{what} is off from step {self._curve.last_step} on: {error}")

    def _add_sink(self, what: str, make: Callable[[], Sink]) -> None:
        if sink := self._attempt(what, make):
            self._sinks.append(sink)

    def close(self, status: str, step: int) -> dict[str, Any]:
        """Write the last event and what is still on its way; returns what there was to regret."""
        deadline = time.monotonic() + min(self._settings.close_timeout, 3600.0)
        while self._pending and time.monotonic() < deadline:
            self.land()
            time.sleep(0.001)
        lost, self._pending = len(self._pending), deque()
        self._stop.set()
        if self._timer is not None:
            self._timer.join(max(0.0, deadline - time.monotonic()))
        self.event("finish", step, status=status, lost=lost, degraded=", ".join(self._degraded))
        if self._timer is None or not self._timer.is_alive():  # else a sink hangs
            self.drain()
            for sink in list(self._sinks):
                self._let_go(sink)
        if self._journal is not None:
            lost += self._journal.close()
        self._curve.recorded = self._curve.recorded or bool(self._queue)
        return {"lost_records": lost, "degraded": self._degraded, "records": self.seq}


class PendingValue:
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
        value = value.detach()
        tensor.copy_(value.reshape(()) if value.dim() else value, non_blocking=True)

    @staticmethod
    def _allocate(count: int) -> Iterator[tuple[Any, Any, Any]]:
        torch = torch_module()  # of which a script may set another default dtype
        for tensor in torch.empty(count, dtype=torch.float32, pin_memory=True).unbind():
            at = tensor.data_ptr()
            yield tensor, ctypes.c_uint32.from_address(at), ctypes.c_float.from_address(at)

    def arrived(self) -> bool:
        return bool(self._cell[1].value != self._ABSENT)

    def take(self) -> float:
        return float(self._cell[2].value)

    def __del__(self) -> None:
        if self.arrived():  # else a copy may yet come, into the next one's value
            self._free.append(self._cell)


def all_arrived(values: Sequence[Any]) -> bool:
    for value in values:  # noqa: SIM110, a generator costs more, and each step passes here
        if value.__class__ is PendingValue and not value.arrived():
            return False
    return True


def as_number(name: str, value: Any) -> Any:
    """A float; what a CUDA value will arrive in; None for what is no number."""
    try:
        if value.__class__ is PendingValue:
            return value
        if getattr(value, "is_cuda", False) and value.numel() == 1:
            return PendingValue(value)
        if value.__class__ is not str:
            return float(value.item() if hasattr(value, "item") else value)
        raise TypeError("it is a text")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(value, _STRUCTURES) and not name.startswith("loss/"):
            return None
        return warn_once(f"{name} is not recorded, for it is not one number: {error}", name)


_STRUCTURES = (str, list, tuple, Mapping)
_TAGS = frozenset(["phase", "rank", "event", "epoch", "supersedes_from"])  # that have a meaning


def without_structures(
    metrics: Mapping[str, Any], values: Sequence[Any], tags: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Numbers stay metrics; lists, dicts and texts become tags; what is neither is left out."""
    pairs = zip(metrics.items(), values, strict=True)
    numbers = {name: value for (name, _), value in pairs if value is not None}
    others = {str(n): v for n, v in metrics.items() if isinstance(v, _STRUCTURES)}
    kept = {n + "_" * (n in _TAGS): to_json(v, n) for n, v in others.items() if n[:5] != "loss/"}
    return numbers, [*numbers.values()], {**kept, **tags}


class Journal:
    """metrics.ndjson: a line a record, each by one write of a file opened for appending."""

    BACKLOG = 100_000  # lines that wait in memory for a full disk

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._settings = path, settings
        self._waiting: deque[bytes] = deque()  # for a disk that is full
        self._dropped = 0
        self._synced = (0.0, 0)  # when, and how far
        self._before: list[int] = []  # files of the shards before, yet to be synced and closed
        self._fd, self._size, self._began = self._open()

    def _open(self) -> tuple[int, int, float]:
        fd = append_to(self._path)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            size += os.write(fd, b"\n")  # behind a line that a kill has torn
        return fd, size, time.time()

    def write(self, line: bytes) -> None:
        if self._waiting:
            return self._wait(line)
        try:
            done = os.write(self._fd, line)
        except OSError as error:
            warn_once(f"{self._path} cannot be written ({error}); its lines wait in memory")
            return self._wait(line)
        self._size += done
        if done < len(line):  # the disk is full: go on at the missing byte
            return self._wait(line[done:])
        return self._next_shard() if 0 < self._settings.shard_bytes <= self._size else None

    def _wait(self, line: bytes) -> None:
        if len(self._waiting) < self.BACKLOG:
            self._waiting.append(line)
        else:
            self._dropped += 1

    def retry(self) -> None:
        """Write what waits; a file that somebody cut or took away is gone on with all the same."""
        if self._is_gone():
            warn_once(f"{self._path} was removed or replaced; it is gone on with as it is now")
            self._begin_file()
        waiting, self._waiting = self._waiting, deque()
        if waiting and os.fstat(self._fd).st_size != self._size:
            waiting.appendleft(b"\n")  # its torn line is given up
        for line in waiting:
            self.write(line)
        if 0 < self._settings.shard_age < time.time() - self._began and self._size:
            self._next_shard()

    def _is_gone(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return True

    def _begin_file(self) -> None:
        before = self._fd
        self._fd, self._size, self._began = self._open()
        self._before.append(before)  # only now: sync() closes it

    def sync(self, now: float) -> None:
        """So that a power cut costs at most two seconds."""
        while self._before:
            os.fsync(handle := self._before.pop())
            os.close(handle)
        if now - self._synced[0] >= 1 and self._synced[1] != self._size:
            self._synced = (now, self._size)
            os.fsync(self._fd)

    def _next_shard(self) -> None:
        with contextlib.suppress(OSError):  # it goes on in the old file
            older = shards(self._path.parent, self._path.name)[:-1]
            number = 1 + (int(older[-1].stem.rpartition(".")[2]) if older else 0)
            target = self._path.with_suffix(f".{number:04d}{self._path.suffix}")
            os.rename(self._path, target)
            try:
                self._begin_file()
            except OSError:  # no room, no handle
                os.rename(target, self._path)

    def close(self) -> int:
        """Returns how many lines found no place."""
        with contextlib.suppress(OSError):
            self.retry()
            self.sync(math.inf)
        os.close(self._fd)
        return self._dropped + len(self._waiting)


class Evaluation:
    """One validation: its step and epoch, which weights it was of, and its loss."""

    def __init__(
        self, step: int, epoch: int | None, weights: float, loss: float | None = None
    ) -> None:
        self.step, self.epoch, self.weights = step, epoch, weights
        self.loss = loss  # None until it has come from the device


class Curve:
    """The losses: the best, the tail that a checkpoint keeps, and whether a resume fits it."""

    def __init__(self) -> None:
        self.best: Evaluation | None = None  # the lowest finite validation loss
        self.last_step = 0
        self.recorded = False
        self.epoch_losses: dict[Any, Any] = {}  # the last validation loss of a resumed epoch
        self._losses: deque[tuple[int, float]] = deque(maxlen=200)
        self._validations: deque[Evaluation] = deque(maxlen=200)
        self._awaited: deque[Evaluation] = deque()
        self._redone: dict[int, float] = {}  # losses by step, of what a resumed run does again
        self._before: list[float] = []

    def candidate(self) -> Evaluation:
        """The best, or one whose loss has not come yet and may be."""
        coming = [each for each in self._awaited if each.loss is None]
        return coming[-1] if coming else self.best or Evaluation(0, None, math.nan)

    def expect(self, step: int, epoch: int | None, weights: int, loss: Any) -> Evaluation:
        """One to be recorded; a loss that is there already has its rank at once."""
        self._awaited.append(evaluation := Evaluation(step, epoch, weights))
        if loss.__class__ is float:
            self._rank(evaluation, loss)
        return evaluation

    def evaluated(self, loss: float) -> None:
        """Recorded is the oldest one that was not yet."""
        self._validations.append(evaluation := self._awaited.popleft())
        self._rank(evaluation, loss)

    def _rank(self, evaluation: Evaluation, loss: float) -> None:
        best, evaluation.loss = self.best, loss
        again = best is not None and (best.step, best.loss) == (evaluation.step, loss)
        if math.isfinite(loss) and (best is None or again or loss < (best.loss or 0.0)):
            self.best = evaluation

    def take(self, record: Record) -> None:
        self.recorded = self.recorded or bool(record.values and record.form.phase != "system")
        self.last_step = record.step
        if record.form.phase == "train" and record.form.names[:1] == ("loss/train",):
            self._note(record.step, record.values[0])

    def results(self) -> dict[str, Any]:
        return {
            "final_train_loss": self._losses[-1][1] if self._losses else None,
            "final_val_loss": self._validations[-1].loss if self._validations else None,
            "best_val_loss": self.best.loss if self.best else None,
            "best_val_step": self.best.step if self.best else None,
        }

    def facts(self, step: int) -> dict[str, Any]:
        """As of a step, for state.json; the writer may look when the loop is a little further."""
        history = [[at, loss] for at, loss in list(self._losses) if at <= step][-100:]
        best, latest = (
            [v.step, v.epoch, v.loss] if v else None
            for v in (
                self.best,
                next((v for v in reversed(list(self._validations)) if v.step <= step), None),
            )
        )
        return {"best": best, "latest_validation": latest, "loss_history": history}

    def go_on(self, run_dir: Path, state: Mapping[str, Any]) -> int:
        """From a checkpoint's facts, and the losses that will be made again.

        Returns the number of the journal's last record.
        """
        self.last_step, last = state["global_step"], state["seq"]
        self.recorded = last > 0  # not in a fork
        self._losses.extend((step, float(loss)) for step, loss in state["loss_history"])
        self._before = [loss for _, loss in self._losses][-20:]
        weights = -state["steps"] if state.get("is_best") else 0
        best, latest = (
            each and Evaluation(each[0], each[1], weights, float(each[2]))
            for each in (state["best"], state["latest_validation"])
        )
        self.best = best
        self._validations.extend(filter(None, [latest]))
        if latest and latest.epoch == state["epoch"]:
            self.epoch_losses[latest.epoch] = latest.loss
        for record in read_run(run_dir, after=state["seq"]):
            last = record["seq"]
            if record["tags"]["phase"] == "train" and "loss/train" in record["metrics"]:
                self._redone[record["step"]] = float(record["metrics"]["loss/train"])
        return int(last)

    def _note(self, step: int, loss: float) -> None:
        self._losses.append((step, loss))
        again, before = self._redone.pop(step, None), self._before
        self._before = []
        if again not in (None, loss) and (again == again or loss == loss):
            self._redone.clear()
            say(
                f"the resumed run is not bit for bit the one before: at step {step} "
                f"the loss is {loss!r}, before the interruption it was {again!r}"
            )
        if again != loss and len(before) > 2 and not loss <= 2 * max(before) - min(before):
            say(
                f"the loss jumps at the resume: {loss:.6g} at step {step}, "
                f"{before[-1]:.6g} before it"
            )


# --- TensorBoard's format -------------------------------------------------------------------------


class EventForm:
    """Event{wall_time, step, summary{value{tag, simple_value}…}} of protobuf, sizes fixed.

    A CRC is linear: that of an event is that of the same event with its varying bytes zero, XORed
    with what each varying byte adds at its distance from the end. That is some 30 look-ups in
    place of 150 steps, as fast as a vectorised form.
    """

    def __init__(self, names: Sequence[str], step_bytes: int) -> None:
        heads = [b"\x0a" + varint(len(name)) + name + b"\x15" for name in map(str.encode, names)]
        heads = [b"\x0a" + varint(len(head) + 4) + head for head in heads]
        summary = b"\x2a" + varint(sum(len(head) + 4 for head in heads))
        layout = "".join(f"{len(head)}sf" for head in heads)
        self._struct = struct.Struct(f"<cdc{step_bytes}s{len(summary)}s{layout}")
        self._parts: list[Any] = [b"\x09", 0.0, b"\x10", bytes(step_bytes), summary]
        self._parts += [part for head in heads for part in (head, 0.0)]
        blank = self._struct.pack(*self._parts)
        self._length, self._blank_crc = tf_record(blank)[:12], crc32c(blank)
        double, single = struct.unpack("<df", b"\x01" * 12)
        filled = self._pack(double, b"\x01" * step_bytes, [single] * len(names))
        varying = [at for at in range(len(blank)) if blank[at] != filled[at]]
        self._varying = operator.itemgetter(*varying)
        self._tables = [crc_table(len(blank) - 1 - at) for at in varying]

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
        return self._length + body + masked_crc_bytes(crc)


def tf_record(body: bytes) -> bytes:
    """TFRecord: the length, its masked CRC32C, the bytes, theirs."""
    length = struct.pack("<Q", len(body))
    return length + masked_crc(length) + body + masked_crc(body)


def masked_crc(data: bytes) -> bytes:
    """Four bytes, as TFRecord has them."""
    return masked_crc_bytes(crc32c(data))


def masked_crc_bytes(crc: int) -> bytes:
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """CRC32C (Castagnoli)."""
    table, crc = crc_table(0), 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@functools.cache
def crc_table(distance: int) -> list[int]:
    """What each value of a byte adds to the CRC at that distance from the end."""
    if distance:
        first = crc_table(0)
        return [(x >> 8) ^ first[x & 0xFF] for x in crc_table(distance - 1)]
    table = list(range(256))
    for _ in range(8):
        table = [(x >> 1) ^ (0x82F63B78 if x & 1 else 0) for x in table]
    return table


def varint(number: int) -> bytes:
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


class TensorBoard:
    """An event file, an event a record; it needs neither tensorboard nor protobuf.

    Every file, the first too, begins with a session START at step 0, upon which a reader that is
    already open forgets what older files said: so the file of a resumed run holds the whole curve.
    """

    def __init__(self, directory: Path, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """The `earlier` records, as `read_run` gives them, are written first."""
        make_dirs(directory)
        self._earlier = iter(earlier)
        # A reader takes the files in the order of their names.
        newest = max((int(name.split(".")[3]) for name in event_files(directory)), default=0)
        second = max(int(time.time()), newest + 1)
        name = f"events.out.tfevents.{second}.{platform.node()}.{os.getpid()}.obs"
        self._fd = append_to(directory / name)
        head = b"\x09" + struct.pack("<d", time.time())
        write_all(self._fd, tf_record(head + b"\x1a\x0dbrain.Event:2"))
        write_all(self._fd, tf_record(head + b"\x10\x00\x3a\x02\x08\x01"))  # session_log: START

    def write(self, records: Sequence[Record]) -> None:
        while earlier := [*itertools.islice(self._earlier, 64)]:
            self._append(map(Record.of, earlier))
        self._append(records)

    def _append(self, records: Iterable[Record]) -> None:
        write_all(self._fd, b"".join([self._event(r) for r in records if r.values]))

    def _event(self, record: Record) -> bytes:
        # What is said of an epoch is drawn at the epoch.
        step = varint(record.form.tags.get("epoch", record.step))
        return record.form.event(len(step)).encode(record.wall, step, record.values)

    def close(self) -> None:
        try:
            self.write([])
        finally:
            os.close(self._fd)


def event_files(directory: Path) -> dict[str, int]:
    """Ours in a run's event directory, and their sizes."""
    found = sorted(directory.glob("events.out.tfevents.[0-9]*.obs"))
    return {path.name: path.stat().st_size for path in found}


class WeightsAndBiases:
    """W&B where it is installed; on this machine only with WANDB_MODE=offline."""

    def __init__(self, home: RunDirectory, resumed: bool) -> None:
        if resumed:
            say("W&B takes no point back: what this resume makes again is twice in its curve")
        with generators_untouched():
            import wandb

            config = dict(home.config["config"] or {})
            self._run = wandb.init(
                name=home.path.name,
                config=config,
                dir=home.path,
                id=home.config["id"],
                resume="allow",
            )
            self._run.define_metric("*", step_metric="global_step")

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if record.values:
                metrics = dict(zip(record.form.names, record.values))
                self._run.log({**metrics, "global_step": record.step})

    def close(self) -> None:
        self._run.finish()


class TrainingLog:
    """training.log: evaluations and events as JSON lines with readable times."""

    def __init__(self, run_dir: Path) -> None:
        self._fd = append_to(run_dir / "training.log")

    def write(self, records: Sequence[Record]) -> None:
        lines = b"".join([self._line(r) for r in records if r.form.phase in ("eval", "event")])
        if lines:
            write_all(self._fd, lines)
            os.fsync(self._fd)

    def _line(self, record: Record) -> bytes:
        line = {"event": "validation", "time": readable(record.wall), "step": record.step}
        tags = {name: tag for name, tag in record.form.tags.items() if name != "phase"}
        line |= {**tags, **dict(zip(record.form.names, record.values))}
        return json.dumps(to_json(line)).encode() + b"\n"

    def close(self) -> None:
        os.close(self._fd)


# --- The run's directory --------------------------------------------------------------------------


class RunDirectory:
    """out/<run>/: its lock and its documents. One process writes it."""

    def __init__(self, path: Path, filename: str = "metrics.ndjson") -> None:
        """Take the lock before anything is touched. Raises RunError where another process has it.

        Of a journal with a name of its own the other documents are apart from the run's, too.
        """
        self.path, self.journal = path, path / filename
        self._stream = stream_of(filename)
        self._lock = lock_run(path / f"{self._stream}.lock")
        self.config: dict[str, Any] = {}
        self.manifest: dict[str, Any] = {}
        self._plotted = time.monotonic()
        self._plotting: Any = None

    @classmethod
    def create(cls, settings: Settings, header: Mapping[str, Any]) -> RunDirectory:
        """A directory of the family's name, or the next free one."""
        out, tb = script_dir() / settings.out_dir, script_dir() / settings.tb_dir
        filename = settings.metrics_filename
        stream = stream_of(filename)
        stem = header["family"] or "_".join(
            filter(None, ("run", stamp(), (git_commit() or "")[:7]))
        )
        make_dirs(out / stem if stream else out)
        home = cls(out / stem if stream else free_directory(out, tb, stem), filename)
        home.config = {
            "schema": SCHEMA,
            "run": home.path.name,
            "id": os.urandom(8).hex(),
            "created": readable(time.time()),
            "script": os.path.relpath(script_path(), out),
            "tb_dir": os.path.relpath(tb / home.path.name / stream[1:], home.path),
            "checkpoints": "checkpoints",
        }
        home.manifest = manifest()
        home.save_config(header)
        return home

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """An existing run. Raises RunError where it is alive, DamageError, OSError."""
        home = cls(path)
        home.config = read_sealed(path / "config.json")
        home.manifest = read_sealed(path / "run_manifest.json")
        return home

    @property
    def tb_dir(self) -> Path:
        return Path(os.path.normpath(self.path / self.config["tb_dir"]))

    def save_config(self, header: Mapping[str, Any]) -> None:
        self.config |= header
        self.save("config.json", self.config)

    def describe(self, resumed: Mapping[str, Any] | None) -> dict[str, Any]:
        """Note who started it, and return what the first record says."""
        start = {"time": readable(time.time()), **this_process()}
        if resumed is None or resumed.get("parent"):
            self.manifest |= {"started": start, "hyperparameters": self.config["config"]}
        facts = {name: (resumed or {}).get(name) for name in ("checkpoint", "parent", "differs")}
        facts = {name: fact for name, fact in facts.items() if fact}
        if resumed is not None:
            self.manifest["resumed"] = [*self.manifest.get("resumed", []), {**start, **facts}]
            facts |= {"supersedes_from": resumed["seq"], "events": event_files(self.tb_dir)}
        self.save("run_manifest.json", self.manifest)
        return {"run": self.path.name, **facts}

    def save_results(self, facts: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        paths = shards(self.path, self.journal.name)
        paths += [self.tb_dir / name for name in event_files(self.tb_dir)]
        sizes = {os.path.relpath(path, self.path): path.stat().st_size for path in paths}
        results = {
            "schema": SCHEMA,
            "run": self.path.name,
            **facts,
            **peaks(),
            "files": sizes,
            "started": self.manifest["started"]["time"],
            "ended": readable(time.time()),
        }
        best = self.path / "checkpoints" / "best"
        if best.is_symlink():
            results["best_checkpoint"] = f"checkpoints/{os.readlink(best)}"
        results = {name: value for name, value in results.items() if value is not None}
        self.save("results.json", {**results, **given})
        self.manifest |= {"ended": results["ended"], "degraded": facts["degraded"]}
        self.save("run_manifest.json", self.manifest)

    def save(self, name: str, content: Mapping[str, Any]) -> None:
        path = self.path / name.replace(".json", f"{self._stream}.json")
        try:
            replace_file(path, seal(to_json(content)), durable=True)
        except OSError as error:
            warn_once(f"{path} cannot be written: {error}")

    def tick(self, now: float, plot_interval: float) -> None:
        # Asked at init, the name of the device would start CUDA before the script does.
        known = numerics() if "torch" in sys.modules else {}
        if known.get("device") != self.manifest.get("device"):
            self.manifest |= known
            self.save("run_manifest.json", self.manifest)
        if 0 < plot_interval <= now - self._plotted:
            self._plotted = now
            self.plot()

    def plot(self, *, last: bool = False) -> None:
        """By a process of its own at the lowest priority: a thread would hold the loop's GIL."""
        import importlib.util
        import subprocess

        tools = Path(__file__).with_name("observability_tools.py")
        busy = self._plotting is not None and self._plotting.poll() is None
        if (busy and not last) or not tools.exists() or not importlib.util.find_spec("matplotlib"):
            return
        nowhere = subprocess.DEVNULL
        command = [sys.executable, str(tools), "plot", str(self.path)]
        self._plotting = subprocess.Popen(
            command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True
        )

    def unlock(self, *, forked: bool = False) -> None:
        """Of a forked worker the parent keeps the lock."""
        if self._lock >= 0:
            if not forked:
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Take away what a start that failed has written, and nothing else."""
        for name in (f"config{self._stream}.json", f"run_manifest{self._stream}.json"):
            (self.path / name).unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)
        (self.path / f"{self._stream}.lock").unlink()
        if not self._stream:
            (self.path / "training.log").unlink(missing_ok=True)
        for name in event_files(self.tb_dir):
            (self.tb_dir / name).unlink()
        self.unlock()
        for directory in (self.tb_dir, self.path):
            with contextlib.suppress(OSError):  # something else lies there
                directory.rmdir()


def lock_run(path: Path) -> int:
    """The right to write a run, which ends with the process. Raises RunError where it is taken."""
    fd = append_to(path)
    patience = time.monotonic() + 0.5  # a command that looks holds it for a moment
    while not flock(fd):
        if time.monotonic() > patience:
            os.close(fd)
            raise RunError(
                f"{path.parent} is being written by {path.read_text().partition(CRC_MARK)[0]}; "
                "wait for its end, or give another name"
            )
        time.sleep(0.02)
    os.ftruncate(fd, 0)
    os.write(fd, with_crc(f"process {os.getpid()} on {platform.node()}"))
    return fd


CRC_MARK = ", crc "


def with_crc(text: str) -> bytes:
    return f"{text}{CRC_MARK}{zlib.crc32(text.encode()):08x}".encode()


def alive(run_dir: str | Path) -> bool:
    """Whether a process is writing this run."""
    try:
        fd = os.open(Path(run_dir) / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        return not flock(fd, shared=True)
    finally:
        os.close(fd)


def free_directory(out: Path, tb: Path, stem: str) -> Path:
    """The first of stem, stem-2, … that neither a run nor events have; it is made, to have it."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    for name in names:
        with contextlib.suppress(FileExistsError):
            if (tb / name).exists():
                continue
            (out / name).mkdir()
            break
    if name != stem:
        say(f"{out / stem} holds another run; this one is in {out / name}")
    return out / name


def stream_of(filename: str) -> str:
    """The word that sets a second stream of a run apart, with a dot before it."""
    word = Path(filename).stem.removeprefix("metrics").strip("._-")
    return word and f".{word}"


def safe_name(name: object) -> str:
    """A name that stays within its folder and fits there; empty for a run without one."""
    given = "" if name is None else str(name)
    kept = re.sub(r"[/\\\0-\x1f]+", "_", given).encode(errors="replace")[:200]
    name = kept.decode(errors="ignore").strip(". ") or ("run" if given else "")
    if name != given:
        say(f"the name {given!r} would lead elsewhere; it is {name!r}")
    return name


# --- Reading a run --------------------------------------------------------------------------------


def shards(run_dir: str | Path, filename: str = "metrics.ndjson") -> list[Path]:
    """The files of a journal, the oldest first."""
    current = Path(run_dir) / filename
    found = {p: p.stem.rpartition(".") for p in current.parent.glob(f"*{current.suffix}")}
    found = {p: s for p, s in found.items() if s[0] == current.stem and s[2].isdecimal()}
    older = sorted(found, key=lambda path: int(found[path][2]))
    return [*older, *([current] if current.exists() else [])]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is not, to the last byte, what was written."""
    body, mark, _ = line.rpartition(b',"crc":')
    if not mark or line != b'%b,"crc":%d}\n' % (body, zlib.crc32(body)):
        return None
    try:
        record: dict[str, Any] = json.loads(line)
        return record if _FIELDS(record) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


_FIELDS = operator.itemgetter("seq", "time", "step", "metrics", "tags")
_HEAD = re.compile(rb'\{"schema":(\d{1,9}),"seq":(\d{1,18}),')
_LINE = 16 << 20  # bytes at most; a file without line ends must not fill the memory


def read_run(
    run_dir: str | Path,
    filename: str = "metrics.ndjson",
    *,
    superseded: bool = False,
    damage: list[str] | None = None,
    after: int = -1,
    until: int = sys.maxsize,
) -> Iterator[dict[str, Any]]:
    """The records of a run in their order, without those that a resume has made again.

    Args:
        superseded: give those too.
        damage: gets a sentence for each line of the journal that is no record.
        after, until: only the records with a higher number, and none with a higher one.
    Raises:
        RunError: there is no journal, or it is of a newer schema.
    """
    paths = shards(run_dir, filename)
    if not paths:
        raise RunError(f"{run_dir} holds no {filename}; give the directory of a run")
    resumes = [] if superseded else list(_resumes(paths))
    for path, number, line in _lines(paths):
        head = _HEAD.match(line)
        if head and int(head[1]) > SCHEMA and (parse_line(line) or b',"crc":' not in line):
            raise RunError(
                f"{path} has schema {int(head[1])}, this file knows up to {SCHEMA}; "
                "use the observability.py that wrote it"
            )
        if head and not after < int(head[2]) <= until:
            continue
        record = parse_line(line)
        if record is None:
            if damage is not None:
                damage.append(f"{path}, line {number}: no whole record")
        elif record["tags"]["phase"] not in ("train", "eval") or not any(
            first < record["seq"] < resume for first, resume in resumes
        ):
            yield record


def _resumes(paths: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """For each resume the number of the checkpoint's last record, and its own."""
    for _, _, line in _lines(paths):
        record = parse_line(line) if b'"supersedes_from":' in line else None
        if record and record["tags"].get("event") == "resume":
            yield record["tags"]["supersedes_from"], record["seq"]


def _lines(paths: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    for path in paths:
        yield from ((path, number, line) for number, line in enumerate(_lines_of(path), 1))


def _lines_of(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while line := file.readline(_LINE):
            yield line
            if len(line) == _LINE:  # no journal of ours
                return


# --- Facts about the run --------------------------------------------------------------------------

_ENVIRONMENT = re.compile(
    r"PYTHONHASHSEED|CODEX_(AUDIT|DDP)|(CUDA|CUBLAS|NCCL|OMP|MKL|ATEN|TORCH|OBS|WANDB|SLURM)_\w+"
    r"|(LOCAL_)?RANK|WORLD_SIZE|PRESET|TITLES"
)


def script_path() -> Path:
    """The training script; in a notebook a name in the working directory."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(main).resolve() if main else Path.cwd() / "notebook"


def script_dir() -> Path:
    return script_path().parent


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H-%M-%S")


def readable(wall: float) -> str:
    """ISO 8601, local time with its offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(wall))


def this_process() -> dict[str, Any]:
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or os.environ.get("USERNAME")
    arguments = redacted_arguments(sys.argv)
    return {"host": platform.node(), "pid": os.getpid(), "user": user, "command_line": arguments}


def manifest() -> dict[str, Any]:
    """Where the run came from. The runbook's keys are there as null when unknown."""
    script = script_path()
    locks = (d / name for d in script.parents for name in ("uv.lock", "uv.lock.json"))
    lock = next((lock for lock in locks if lock.is_file()), None)
    # By its dict: to ask a lazy module for an attribute might import what it stands for.
    modules = {name: getattr(module, "__dict__", {}) for name, module in [*sys.modules.items()]}
    installed = {n: of for n, of in modules.items() if "-packages" in str(of.get("__file__"))}
    loaded = [(name, of.get("__version__")) for name, of in installed.items()]
    known = {name: of for name, of in os.environ.items() if _ENVIRONMENT.fullmatch(name)}
    return {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_sha": git_commit(),
        "lock_sha256": lock and sha256(lock),
        "env": {**dict.fromkeys(("PYTHONHASHSEED", "CODEX_AUDIT", "CODEX_DDP")), **known},
        "script": script.name,
        "script_sha256": sha256(script) if script.is_file() else None,
        "command_line": redacted_arguments(sys.argv),
        "cpu": next(iter(re.findall(r"model name\s*: (.*)", proc("cpuinfo"))), platform.machine()),
        "packages": {n: v for n, v in sorted(loaded) if isinstance(v, str) and "." not in n},
        **(numerics() if "torch" in sys.modules else {}),
    }


def git_commit() -> str | None:
    """`GIT_SHA`, else HEAD of the script's repository, read from .git; None outside git.

    By no subprocess: a forked child costs a CUDA process seconds.
    """
    if given := os.environ.get("GIT_SHA"):
        return given
    with contextlib.suppress(OSError, ValueError, StopIteration):
        git = next(d / ".git" for d in script_path().parents if (d / ".git").exists())
        commit = head_commit(git)
        return commit if re.fullmatch("[0-9a-f]{40,64}", commit) else None
    return None


def head_commit(git: Path) -> str:
    """Raises OSError, ValueError, StopIteration for what is no repository with a commit."""
    if git.is_file():  # a worktree: "gitdir: …"
        git = git.parent / git.read_text().partition(":")[2].strip()
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref: "):
        return head
    common = git / "commondir"
    root = git / common.read_text().strip() if common.exists() else git
    if (root / head[5:]).exists():
        return (root / head[5:]).read_text().strip()
    packed = (line.split() for line in (root / "packed-refs").read_text().splitlines())
    return next(words[0] for words in packed if words[1:] == [head[5:]])


def numerics() -> dict[str, Any]:
    """What decides about the last digits beside the seed: versions, device and flags."""
    torch = torch_module()
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
        "world_size": process_place()[1],
    }


def proc(name: str) -> str:
    """A file of Linux's /proc; empty elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc", name).read_text()
    return ""


class SystemSampler:
    """Seconds, bytes and percent, of this process and of its host. Never waits for a device."""

    def __init__(self, settings: Settings) -> None:
        self._interval, self._wants_gpu = settings.system_interval, settings.gpu
        self._nvml: Any = None
        self._sampled_at = -math.inf
        self._before = self._clocks()

    def is_due(self, now: float) -> bool:
        return 0 < self._interval <= now - self._sampled_at

    @staticmethod
    def _clocks() -> list[float]:
        """Seconds that passed and that this process used; ticks of all processors, and idle."""
        ticks = [int(number) for number in proc("stat").partition("\n")[0].split()[1:9]]
        return [time.monotonic(), time.process_time(), sum(ticks), sum(ticks[3:5])]

    def sample(self) -> dict[str, float]:
        before, self._before = self._before, self._clocks()
        self._sampled_at = self._before[0]
        wall, own, ticks, idle = (now - then for now, then in zip(self._before, before))
        facts = {"cpu_seconds": self._before[1], "cpu_percent": 100 * own / max(wall, 1e-9)}
        if ticks:
            facts["host_cpu_percent"] = 100 * (1 - idle / ticks)
        if statm := proc("self/statm"):
            facts["rss_bytes"] = int(statm.split()[1]) * mmap.PAGESIZE
        kib = {line.split()[0]: int(line.split()[1]) for line in proc("meminfo").splitlines()}
        if "MemAvailable:" in kib:
            facts["host_ram_bytes"] = 1024 * kib["MemTotal:"]
            facts["host_ram_used_bytes"] = 1024 * (kib["MemTotal:"] - kib["MemAvailable:"])
            facts["host_swap_used_bytes"] = 1024 * (kib["SwapTotal:"] - kib["SwapFree:"])
        if hasattr(os, "getloadavg"):
            facts["host_load_1m"] = os.getloadavg()[0]
        return {f"system/{k}": float(v) for k, v in {**facts, **peaks()}.items()} | self._gpus()

    def _gpus(self) -> dict[str, float]:
        """By NVML, whose module is called pynvml."""
        if not self._wants_gpu:
            return {}
        try:
            with generators_untouched():
                import pynvml as nvml
            if self._nvml is None:
                nvml.nvmlInit()
                self._nvml = nvml
            every = range(nvml.nvmlDeviceGetCount())
            return {k: v for at in every for k, v in self._gpu(nvml, at).items()}
        except Exception as error:  # a package or driver that is not there, NVML's own errors
            self._wants_gpu = False
            warn_once(f"no gpu_* keys: {error}; pip install nvidia-ml-py")
            return {}

    @staticmethod
    def _gpu(nvml: Any, at: int) -> dict[str, float]:
        end, device = f"/{at}" if at else "", nvml.nvmlDeviceGetHandleByIndex(at)
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        return {
            f"gpu_util_percent{end}": float(nvml.nvmlDeviceGetUtilizationRates(device).gpu),
            f"gpu_memory_used_bytes{end}": float(memory.used),
            f"gpu_memory_total_bytes{end}": float(memory.total),
            f"gpu_power_watts{end}": nvml.nvmlDeviceGetPowerUsage(device) / 1000,
            f"gpu_temperature_c{end}": float(nvml.nvmlDeviceGetTemperature(device, 0)),
        }


def peaks() -> dict[str, float]:
    """The most memory so far, in bytes: of the process, and what torch has held on the device."""
    facts: dict[str, float] = {}
    with contextlib.suppress(ImportError):  # Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        facts["cuda_allocated_bytes"] = torch.cuda.memory_allocated()
        facts["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return facts


# --- JSON without secrets -------------------------------------------------------------------------

_SECRET_NAME = (  # what a secret's name ends in
    r"(?:token|secrets?|passw(?:or)?ds?|passphrases?|pwds?|credentials?|auth|bearer|jwts?"
    r"|authorization|cookies?|dsn|signature|(?<![a-z])(?:pass|pw|pin|otp|sig)|(?<=--)key"
    r"|(?:access|api|auth|bearer|github|hf|hub|refresh|session)[_-]?tokens"
    r"|(?:api|access|private|secret|account|signing|encryption|ssh|wandb)[_-]?keys?(?:_?id)?)"
)
_SECRETS = {  # what a secret looks like wherever it stands, and what is left of it
    r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z ]*-----|$)": "",
    r"(?<=://)[^/\s'\"]*(?=@)": "",  # a URL's user and password
    # Without a scheme too, and with what should have been quoted in it; a port is no password.
    r"(?<=//)[^/\s'\":@\[]{0,99}:(?!\s|\d{1,5}(?:[/?#\s]|$))"
    r"(?:[^/\s'\"]{1,99}|[^'\"@\r\n]{1,99})(?=@)": "",
    r"(?i)\b(bearer|basic) +[\w.~+/=-]{16,}": r"\1 ",
    r"(?i)((?:authorization|cookies?)\\*[\"']?\s*[=:]\s*)[^\r\n\"']+": r"\1",  # to the line's end
    rf"(?i)(?<![\w-])([\w-]*{_SECRET_NAME}[_\d]*\\*[\"']?\s*[=:]\s*)\\*"
    r"(?:\w{0,2}(?:\"[^\"]*\"?|'[^']*'?)|[^\s&;,\"'}<]+)": r"\1",
    r"\b(?:hf|gh[pousr])_[^\W_]{16,}|\b(?:github_pat_|glpat-|xox[abprs]-|AIza)[\w-]{8,}": "",
    r"\b(?:npm_|dop_v1_|sk_live_|rk_live_)\w{8,}|(?<=hooks.slack.com/services/)\S+": "",
    rf"(?i)(?<![\w-])(--?[\w-]*{_SECRET_NAME}[_\d]*[\"']?,? +)"  # an option in a text
    r"(?:\"[^\"]*\"?|'[^']*'?|[^\s-]\S*)": r"\1",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bsk-(?=[\w-]*\d)[\w-]{16,}": "",
    r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?": "",  # a JSON web token
}
_PATTERNS = [(re.compile(p, re.DOTALL), f"{left}<redacted>") for p, left in _SECRETS.items()]
_IS_SECRET = re.compile(rf"(?i)(?:.*[^a-z0-9])?[a-z0-9]*?{_SECRET_NAME}[_\d]*", re.DOTALL)
_OF_A_TOKENIZER = re.compile(r"</?[\w|]+>|\[[A-Z]+\]|\d{1,6}")  # such as <pad>


def is_secret(name: str, value: object) -> bool:
    """By its name. A count of tokens is none, and no padding token; a password's digits are."""
    if not _IS_SECRET.fullmatch(name) or not name.lower().endswith(("token", "tokens")):
        return bool(_IS_SECRET.fullmatch(name))
    return isinstance(value, str) and not _OF_A_TOKENIZER.fullmatch(value)


def redacted(text: str, name: str = "") -> str:
    """The text without what looks like a secret; nothing of it under a secret's name."""
    if is_secret(name, text):
        return "<redacted>"
    for pattern, left in _PATTERNS:
        text = pattern.sub(left, text)
    return text


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """`--token x` and `--token=x` without the x."""
    return [redacted(each, name) for name, each in zip(names_before(arguments), arguments)]


def names_before(items: Sequence[Any]) -> list[str]:
    """For each what it may be the value of: the option before it, in a pair what comes first."""
    found = [""]
    for each in items:
        is_name = isinstance(each, str) and (len(items) == 2 or each.startswith("-"))
        found.append(each if is_name and "=" not in each else "")
    return found


def to_json(value: Any, name: str = "", above: tuple[int, ...] = ()) -> Any:
    """Anything as strict JSON, its secrets redacted; a cycle and what is too deep are left out."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real):  # numpy's too
        with contextlib.suppress(OverflowError):
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, int | float):
        return "<redacted>" if is_secret(name, value) else value
    items = items_of(value)
    if items is None:
        return redacted(shown(value), name)
    if id(value) in above or len(above) > 40:
        return "<left out: a cycle, or too deep>"
    above = (*above, id(value))
    secret = name if _IS_SECRET.fullmatch(name) else ""
    if isinstance(items, list):
        names = names_before(items)
        return [to_json(each, secret or before, above) for before, each in zip(names, items)]
    return {redacted(key): to_json(each, secret or key, above) for key, each in items.items()}


def items_of(value: Any) -> dict[str, Any] | list[Any] | None:
    """What a container holds; None for what is none, and for a stranger's that raises."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name, None) for each in fields(value)}
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        value = vars(value)
    if isinstance(value, Mapping):
        return attempt(lambda: {shown(key): each for key, each in value.items()}, None)
    is_list = isinstance(value, list | tuple | set | frozenset | deque)
    return attempt(lambda: list(value), None) if is_list else None


def shown(value: Any) -> str:
    """As text, without addresses in memory: they are others in every run."""
    if hasattr(value, "untyped_storage"):  # to print a tensor would wait for its device
        return f"<tensor of {tuple(value.shape)}>"
    unshown = f"<{type(value).__name__} that cannot be shown>"
    return attempt(lambda: re.sub(r" at 0x[0-9a-f]+", "", str(value)), unshown)


def attempt(call: Callable[[], R], otherwise: R) -> R:
    try:
        return call()
    except Exception:  # strangers' code: how an object iterates, compares or shows itself
        return otherwise


# --- Files ----------------------------------------------------------------------------------------


def append_to(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)


def write_all(fd: int, data: Any) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def open_regular(path: Path) -> io.BufferedReader:
    """For reading; a pipe or a device is refused, which would be waited for without an end."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamageError(f"{path} is no regular file")
    return open(fd, "rb")


@contextlib.contextmanager
def errors_about(path: str | Path) -> Iterator[None]:
    """Let an error of reading name its file, as one of opening does."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def replace_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Whole or not at all; durable: a power cut does not take it back."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        sync_dir(path.parent)


_SEAL = ',\n "self_crc32": "{:08x}"\n}}\n'  # ends a document; the sum is of all bytes before it


def seal(content: Mapping[str, Any]) -> bytes:
    body = json.dumps(content, indent=1, default=str).removesuffix("\n}").encode()
    return body + _SEAL.format(zlib.crc32(body)).encode()


def read_sealed(path: str | Path) -> dict[str, Any]:
    """A document that `seal` made. Raises DamageError where it is not as written, OSError."""
    with open_regular(Path(path)) as file, errors_about(path):
        data = file.read(64 << 20)
    body = data[: -len(_SEAL.format(0))]
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or data != body + _SEAL.format(zlib.crc32(body)).encode():
        raise DamageError(f"{path} is not what was written")
    return content


def flock(fd: int, *, shared: bool = False) -> bool:
    """Whether the file is ours now, by a lock that ends with the process."""
    try:
        if fcntl is not None:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def sync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_dirs(path: Path) -> None:
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for created in missing:  # or a power cut takes the whole new tree, however synced its files
        sync_dir(created.parent)


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def torch_module() -> Any:
    """Imported by what needs it: the commands that only read a run do without."""
    import torch

    return torch


@contextlib.contextmanager
def generators_untouched() -> Iterator[None]:
    """Python's and numpy's random state stay, whatever a stranger's package draws."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


# ==================================================================================================
# Part II: checkpoints. Nothing below runs unless saving or resuming is on.
# ==================================================================================================

# --- When and where in the loop -------------------------------------------------------------------

KINDS = ("model", "optimizer", "scheduler", "scaler", "loader", "generator")


class Loop:
    """Where the script is: which epoch, how many of its batches, and between what."""

    def __init__(self) -> None:
        self.epoch: Any = None
        self.batches = 0  # of this epoch, with the one under way
        self.rests = False  # since step(), up to the next iteration
        self.held: dict[str, Any] | None = None  # the generators at a step() that may be the last
        self.broke = False  # the loop, after the step that was last
        self.leave = False  # the loop, in a resumed run
        self.start: Any = None  # the generators before the loop over batches

    def begin(self, epoch: Any, start: Any, batches: int = 0) -> None:
        self.epoch, self.start, self.batches = epoch, start, batches
        self.held, self.rests = None, False


class ResumePoint(NamedTuple):
    """The place that a resumed run has yet to come to."""

    epoch: Any
    batches: int  # that are done
    passed: int  # of the batches, by a loader with a state of its own
    whole: bool  # nothing of the epoch is left to do
    broke: bool  # the loop was left here
    rng: dict[str, Any]  # the generators at the checkpoint; under "start", those before the loop


class Checkpointer:
    """When a run saves, and how a killed one goes on to the same last digit.

    `iter(loader)` draws from the global generators, and so may every batch. A resumed epoch
    therefore begins with the generators as they were when it first began, passes the batches that
    are done, and at the last of them gives the generators the state that the checkpoint has.

    A save is exact in two places: in step(), where the batches of the epoch are counted, and
    between two epochs, in skip_epoch(). One that is asked for elsewhere waits for the next of them.
    """

    def __init__(self, run: Run) -> None:
        self.wanted = ""  # a save, at the next place where it is exact, and what it is for
        self.is_back = False
        self.completed = False  # the run that is resumed
        self.resumed: dict[str, Any] | None = None  # the state that it begins with
        self.policy = SavePolicy(run.saving.save_interval)
        self.signals = Signals(lambda: run.steps > 0)
        self._run = run
        self._plan: Plan | None = None
        self._error: CheckpointError | None = None
        self._loop = Loop()
        self._point: ResumePoint | None = None
        self._carried = CarriedLocals()
        self._checks = CallSiteChecks(run.watched, self._loop, self._carried)
        self._saver: Saver | None = None
        self._saved: tuple[float, Path | None] = (0, None)  # which weights, and where

    def reserve(self) -> bool:
        """Find the run that is to be gone on with, and take its lock; False for a new run.

        What keeps a wanted resume from happening is raised later, by resume().
        """
        run, wish = self._run, self._run.saving.resume
        if self.policy.every:
            self.signals.catch()
        if wish in ("", "never"):
            return False
        try:
            if run.recorder.rank:
                return True  # as rank 0 decides
            self._plan = find_plan(run, wish)
            if self._plan is not None and self._plan.run_dir is not None:
                run.home = RunDirectory.reopen(self._plan.run_dir)
                self.completed = is_completed(self._plan.run_dir)
        except _REFUSALS as error:
            self._error = as_checkpoint_error(error)
        return self._plan is not None or self._error is not None

    def begin_anew(self) -> dict[str, Any] | None:
        """In another run; returns the state that it is a fork of, if of one."""
        if self.completed and self.policy.every:
            self.signals.catch()
        if self._run.home is not None:
            self._run.home.unlock()
            self._run.home = None
        self.is_back, self.completed, self._plan, self._error = True, False, None, None
        return self.resumed and {**self.resumed, "parent": str(self._saved[1]), "seq": 0}

    def begin_late(self, asked: Iterable[Asked], pace: Pace) -> Checkpointer:
        """By a save() where none was to be expected: how this epoch began, nobody has noted."""
        self.is_back = True
        for names, code, line in asked:
            self._carried.asked |= dict.fromkeys(names, code)
            self._checks.root = code, line
        self._loop.begin(pace.epoch, None, 0 if pace.epoch is None else -sys.maxsize)
        if pace.passed and pace.epoch is None:
            self._checks.note("how the loop began is not known; set a save_interval")
        self.opened()
        return self

    def opened(self) -> None:
        self.tell_ranks()
        self._name_best()  # a kill may have come before it had its name

    def tell_ranks(self, refusal: str = "") -> None:
        """What rank 0 has decided."""
        if not self._run.recorder.rank and process_place()[1] > 1:
            directory = None if self.completed or refusal else self._directory()
            Decision(self._run).publish(self._saved[1], directory, refusal)

    # Resuming.

    def put_back(self) -> dict[str, Any] | None:
        """All that the checkpoint holds but the loop's locals; returns its state, None of none.

        Raises CheckpointError.
        """
        run = self._run
        self._checks.see_at_resume()
        self._loop.start = rng_state(run.watched["generator"]) if "torch" in sys.modules else None
        try:
            if self._error is not None:
                raise self._error
            if run.recorder.rank and run.saving.resume not in ("", "never"):
                given = Decision(run).wait_for("began")["checkpoint"]
                self._plan = Plan(None, Path(given)) if given else None
            if self._plan is not None:
                self.resumed = self._restore(*load_newest(self._plan, run.watched))
        except _REFUSALS as error:
            refusal = as_checkpoint_error(error)
            fenced(self.tell_ranks)(str(refusal))
            raise refusal from (None if refusal is error else error)
        self.is_back = True
        return self.resumed

    def _restore(self, path: Path, state: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        run = self._run
        if (there := state["world_size"]) != (here := process_place()[1]):
            raise CheckpointError(f"{path} is of {there} processes, this launch has {here}")
        saved |= own_generators(path, run.recorder.rank, self._checks)
        loaders = [each for each in run.watched["loader"] if hasattr(each, "load_state_dict")]
        for loader, loader_state in zip(loaders, saved["loader"]):
            loader.load_state_dict(loader_state)
        for listener in run.listeners:
            if hasattr(listener, "resumed"):
                fenced(listener.resumed)(saved["listeners"].get(type(listener).__name__))
        epoch, batches = state["epoch"], state["step_in_epoch"]
        whole = not batches or (state["ended"] and epoch is not None)
        # A loader with a state of its own is at its place already, and at its end gives no batch.
        with contextlib.suppress(TypeError, IndexError):  # some have no length
            if saved["loader"] and len(loaders[0]) == batches:
                saved = {**saved, "start": saved}
        self._point = ResumePoint(
            epoch, batches, batches if saved["loader"] else 0, whole, state["broke"], saved
        )
        if epoch is None:
            self._enter(self._point)
        elif "files" not in state:  # of another tool, whose script may have no skip_epoch()
            set_rng_state(saved, run.watched["generator"])
        self._carried.saved, self._carried.origin = saved["carry"], path
        self._carried.ended = epoch if whole else None
        for sentence in state.get("inexact", ()):
            say(f"{path} was saved with this said: {sentence}")
        self.policy.last = state["steps"]
        parent = None if self._plan and self._plan.run_dir else str(path)
        differs = "; ".join(differences(state, run, saved["optimizer"]))
        if differs:
            say(f"resuming {path} where not all is as it was: {differs}")
        self._saved = (-state["steps"], path)
        self._publish_weights(path)
        return {
            **state,
            "checkpoint": path.name,
            "parent": parent,
            "differs": differs,
            **({"seq": 0} if parent else {}),
        }

    def locals(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self._carried.give(given, self._loop.epoch)

    def skip_epoch(self, epoch: Any) -> bool:
        """Whether a resumed run has done all of this epoch already."""
        point = self._point
        if point is not None and point.epoch is not None and epoch <= point.epoch:
            return bool(epoch < point.epoch) or self._enter(point)
        self._point = None
        if self._loop.epoch is not None and epoch <= self._loop.epoch:
            self._checks.note(f"skip_epoch({epoch}) came twice; number the epochs of all loops on")
        generators = self._run.watched["generator"]
        self._loop.begin(epoch, rng_state(generators) if "torch" in sys.modules else None)
        return False

    def _enter(self, point: ResumePoint) -> bool:
        self._loop.broke = point.broke
        self._loop.leave = point.broke and (not point.whole or point.epoch is None)
        rng = point.rng if point.whole else point.rng["start"]
        set_rng_state(rng, self._run.watched["generator"])
        switch(self._run.watched["model"], point.rng["switched"])
        self._loop.begin(point.epoch, rng, 0 if point.whole else point.passed)
        self._point = None if point.whole else point
        return point.whole

    def skip_batch(self) -> bool:
        """Whether a resumed run has done this batch already."""
        loop, point = self._loop, self._point
        loop.batches += 1
        loop.rests = False
        if point is None or point.epoch != loop.epoch:
            return False
        if loop.batches >= point.batches:
            self._point = None
            set_rng_state(point.rng, self._run.watched["generator"])
            switch(self._run.watched["model"], point.rng["switched"])  # the way back switched too
        return loop.batches <= point.batches

    def ended(self) -> bool:
        """Whether a resumed run left the loop after this batch; it is the last one to be passed."""
        loop = self._loop
        if not loop.leave or (self._point and loop.batches + 1 < self._point.batches):
            return False
        if self._point is not None:
            self.skip_batch()
        loop.leave = False
        return True

    def is_passing(self) -> bool:
        """Whether a resumed run is on its way back: what it does there was done before."""
        return self._point is not None

    # Saving. Each returns a signal that is now to be obeyed.

    def after_step(self, carry: Mapping[str, Any] | None, last: bool) -> int | None:
        loop = self._loop
        loop.broke, loop.rests = last, True
        if carry:
            self._carried.given.update(carry)
        if not self._checks.seen:
            self._checks.seen = True
            self._first_step()
        # Behind an epoch's last batch the script may read what a resumed run has not got: its loss.
        loop.held = None
        if not self._is_due() or (loop.epoch is not None and loop.batches <= 0):
            return None
        if not loop.batches or not self._checks.reads_behind:
            return self._save_now(carry=carry or ())
        loop.held = fenced(self._draws)()
        return None

    def before_iteration(self) -> int | None:
        """A batch is drawn already: here is saved what was due before, at step()."""
        held, best = self._loop.held, self._run.curve.candidate()
        self._loop.held = None  # once: the next batch of an accumulated step is no exact place
        if held is not None:
            return self._save_now(held=held)
        if self.wanted == "best" and self._loop.rests and best.weights == self._run.weights_seen():
            fenced(self.save)(aside=best)
        return None

    def between_epochs(self) -> int | None:
        exact = self._loop.epoch is not None and self._point is None
        return self._save_now(ended=True) if exact and self._is_due() else None

    def _is_due(self) -> bool:
        steps = self._run.steps
        return bool(self.wanted or self.signals.number) or self.policy.due(steps)

    @fenced
    def _first_step(self) -> None:
        self._checks.see_at_step()
        if self.policy.every and not self._is_due():  # the save would find it in its way
            self._open_saver().prepare(self._parts(), self._checks.compare)

    def in_iteration(self) -> bool:
        """Whether the step is yet to come that moves these weights, and no exact place before."""
        loop = self._loop
        has_skips = loop.epoch is not None or loop.batches
        return not self._run.optimizers.stepped and not (loop.rests and has_skips)

    @fenced
    def evaluated(self, evaluation: Evaluation) -> None:
        """Have weights kept that no evaluation so far has found better."""
        run, best = self._run, self._run.curve.best
        if not self.policy.every or not run.saving.save_best or not run.steps:
            return
        if evaluation.loss is not None and evaluation is not best:
            return
        aside = self.in_iteration()
        if aside:
            self.settle()
        if evaluation.weights == self._saved[0]:
            self._name_best()
        elif not aside:
            self.wanted = self.wanted or "best"
        elif not self._open_saver().store.path(run.global_step).exists():
            self.save(aside=evaluation)

    @fenced
    def _save_now(self, **where: Any) -> int | None:
        number = self.signals.number
        if self.wanted:  # by the script, or for the best weights so far; else it may be skipped
            self.settle()
        fenced(self.save)(**where, wait=bool(number))
        return number

    def save(
        self,
        *,
        ended: bool = False,
        held: dict[str, Any] | None = None,
        carry: Iterable[str] = (),
        wait: bool = False,
        aside: Evaluation | None = None,
    ) -> bool:
        """Snapshot, and write behind; False while one is in flight, unless that is waited for.

        One that is made `aside`, for its weights, at no exact place, is gone on from only for want
        of another.
        """
        run, began = self._run, time.monotonic()
        self.wanted = self.wanted if aside and self.wanted != "best" else ""
        frames = script_frames(self._checks.root[0])
        self._carried.look(frames, carry, self._checks)
        self._checks.look(frames)
        state = {**self._place(), "ended": ended, "aside": aside is not None}
        weights, saver = aside.weights if aside else run.weights_seen(), self._open_saver()

        def late() -> dict[str, Any]:
            run.recorder.land()
            run.recorder.drain()
            facts = {**run.curve.facts(state["global_step"]), **self._checks.report()}
            if aside:
                facts["inexact"] = [*facts["inexact"], "it was made at an evaluation"]
            best = run.curve.best
            return {**state, **facts, "is_best": best is not None and best.weights == weights}

        def saved(path: Path) -> None:
            self._saved = (weights, path)
            self._name_best()
            self._publish_weights(path)
            run.recorder.event("saved", state["global_step"], checkpoint=path.name)

        done = saver.save(
            run.global_step,
            lambda: self._parts(held),
            late,
            saved,
            wait=run.saving.save_timeout if wait else 0,
        )
        self.policy.saved(run.steps, began, saver.write_s)
        return done

    def _place(self) -> dict[str, Any]:
        run, loop = self._run, self._loop
        return {
            **numerics(),
            "run_id": run.home.config["id"] if run.home else "",
            "epoch": loop.epoch,
            "step_in_epoch": max(0, loop.batches),
            "broke": loop.broke,
            "global_step": run.global_step,
            "steps": run.steps,
            "seq": run.recorder.seq,
            "time": time.time(),
            **run.progress(),
        }

    def _draws(self) -> dict[str, Any]:
        """What the next batch comes from."""
        watched = self._run.watched
        loaders = [each for each in watched["loader"] if hasattr(each, "load_state_dict")]
        states = [copy.deepcopy(each.state_dict()) for each in loaders]
        return {**rng_state(watched["generator"]), "loader": states}

    def _parts(self, held: Mapping[str, Any] | None = None) -> dict[str, Any]:
        run = self._run
        kept = {
            type(each).__name__: fenced(each.saving)(run.global_step)
            for each in run.listeners
            if hasattr(each, "saving")
        }
        rng = {
            **(held or self._draws()),
            "start": self._loop.start,
            "listeners": kept,
            "switched": fenced(self._checks.switched)(),
            "carry": self._carried.plain(ids_of(run.watched)),
        }
        if run.recorder.rank:
            return {"rng_state.pt": rng}
        manifest = (run.dir or Path()) / "run_manifest.json"
        return {**capture(run.watched), "rng_state.pt": rng, "run_manifest.json": manifest}

    def _open_saver(self) -> Saver:
        if self._saver is None:
            run = self._run
            keep, directory = run.saving.keep_last, self._directory()
            if rank := run.recorder.rank:  # its own generators; more of them, as rank 0 may skip
                keep, directory = 10 * keep, directory / f"rank{rank}"
            store = CheckpointStore(directory, run.home.config["id"] if run.home else "", keep)
            store.keep = {self._saved[1]} if self._saved[1] else set()
            self._saver = Saver(store)
        return self._saver

    def _directory(self) -> Path:
        run = self._run
        if run.recorder.rank:
            return Path(Decision(run).wait_for("directory")["directory"])
        if run.home is None:
            raise CheckpointError("there is no directory of a run to save in")
        if run.saving.ckpt_dir:
            given = script_dir() / run.saving.ckpt_dir
            run.home.save_config({"checkpoints": os.path.relpath(given, run.home.path)})
        return run.home.path / str(run.home.config["checkpoints"])

    def _name_best(self) -> None:
        best, (weights, path) = self._run.curve.best, self._saved
        if best is not None and best.weights == weights and path is not None:
            store = self._open_saver().store
            if path.parent == store.directory:
                store.link("best", path)

    @fenced
    def _publish_weights(self, path: Path) -> None:
        """The plain weights too, where the script asks for them."""
        if self._run.saving.weights and not self._run.recorder.rank:
            publish_weights(path, script_dir() / self._run.saving.weights)

    def finish(self, completed: bool) -> None:
        """The last save, where saving is on and the loop has come to its end."""
        run, timeout = self._run, self._run.saving.save_timeout
        self._checks.end()
        saving = self.policy.every or self.wanted or self._saver
        if not saving or not self._checks.seen:
            return
        done = self.save(ended=True, wait=True) if completed else self.settle()
        if not done:
            say(
                f"the checkpoint of step {run.global_step} took over {timeout:g} s; "
                "raise save_timeout"
            )
        self._name_best()

    def settle(self) -> bool:
        """Wait until what is in flight is durable, or has failed."""
        return self._saver is None or self._saver.wait(self._run.saving.save_timeout)


class SavePolicy:
    """Every so many optimizer steps; or as often as keeps the cost under a share of the time."""

    SHARE = 0.005

    def __init__(self, interval: str) -> None:
        self.every = self._parsed(interval)  # steps; -1 is auto, 0 is off
        self.last = 0  # steps at the last save that came by the interval
        self._cost_s, self._saved_at = 0.0, time.monotonic()

    @staticmethod
    def _parsed(interval: str) -> int:
        if interval == "auto":
            return -1
        if interval.strip().isdecimal():
            return int(interval)
        warn_once(
            f"save_interval={interval!r} is neither a number of steps nor auto: none is saved"
        )
        return 0

    def due(self, steps: int) -> bool:
        if self.every < 0:
            return time.monotonic() - self._saved_at >= max(10.0, self._cost_s / self.SHARE)
        return self.every > 0 and steps // self.every > self.last // self.every

    def saved(self, steps: int, began: float, write_s: float) -> None:
        self.last, self._saved_at = steps, time.monotonic()
        self._cost_s = self._saved_at - began + write_s


class Signals:
    """SIGTERM and SIGINT save at the next place, then end the script as they would have."""

    PATIENCE = 25.0  # seconds that a signal waits for the end of a step

    def __init__(self, is_under_way: Callable[[], bool]) -> None:
        self.number: int | None = None  # that came, and waits
        self._is_under_way = is_under_way
        self._came_at = 0.0
        self._previous: dict[int, Any] = {}

    def catch(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.number is not None or not self._is_under_way():  # the second, or no loop yet
            self.release(number)
        else:
            self.number, self._came_at = number, time.monotonic()

    def tick(self, now: float) -> None:
        if self.number is not None and now - self._came_at > self.PATIENCE:
            say(
                f"no step has ended for {self.PATIENCE:g} s: signal {self.number} is let through, "
                "and what came after the newest checkpoint is lost"
            )
            os.kill(os.getpid(), self.number)

    def kills(self, number: int) -> bool:
        return not callable(self._previous.get(number))

    def release(self, number: int | None) -> None:
        """Give the signals back, and this one to whom it was for."""
        previous, self._previous, self.number = self._previous, {}, None
        for caught, handler in previous.items():
            with contextlib.suppress(ValueError):  # not the main thread
                if signal.getsignal(caught) == self._note:
                    signal.signal(caught, handler)
        if number is not None and callable(handler := previous.get(number)):
            handler(number, None)
        elif number is not None:
            os.kill(os.getpid(), number)


# --- The loop's locals ----------------------------------------------------------------------------


class CarriedLocals:
    """The locals that resume() was asked for: read, at a save alone, from the functions that asked.

    What these do not name is given by `carry`.
    """

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}  # by step(carry=…), or to resume() within an epoch
        self.now: dict[str, Any] = {}  # as of the last look
        self.saved: dict[str, Any] = {}  # of the checkpoint, yet to be given back
        self.origin: Path | None = None
        self.ended: Any = None  # the epoch at whose end the checkpoint was made
        self.asked: dict[str, types.CodeType] = {}  # by which function
        self.begun: dict[str, dict[int, Any]] = {}  # the objects and dicts that it was given

    def give(self, defaults: Mapping[str, Any], epoch: Any) -> dict[str, Any]:
        """Each as it was saved, once; as given from then on."""
        absent = sorted(defaults.keys() - self.saved.keys() - self.asked.keys())
        if absent and self.origin is not None:
            raise CheckpointError(
                f"{self.origin} has no {', '.join(absent)}, which resume() asks for; give step() "
                f"carry={{{', '.join(f'{name!r}: {name}' for name in absent)}}}"
            )
        self.asked |= dict.fromkeys(defaults, caller().f_code)
        values = {name: self.saved.pop(name, value) for name, value in defaults.items()}
        if epoch is not None and self.ended not in (None, epoch):  # what it made ended with it
            values |= {name: defaults[name] for name in defaults if is_made_here(name, caller())}
        values = {name: put_in_place(defaults[name], value) for name, value in values.items()}
        if epoch is not None:  # before the loop they are what they begin with, not a state
            self.given.update(values)
        self.begun |= {name: {id(v): v for v in holders(value)} for name, value in values.items()}
        return values

    def plain(self, watched: set[int]) -> dict[str, Any]:
        """As of the last look. Raises CheckpointError for what would not come back as it was."""
        return {n: plain_part(n, v, self.begun.get(n, {}), watched) for n, v in self.now.items()}

    def look(
        self, frames: Sequence[types.FrameType], carry: Iterable[str], checks: CallSiteChecks
    ) -> None:
        """Read them where they can be seen; what is nowhere makes the checkpoint inexact.

        What step() was given by `carry` just now goes before that, and before what was given once.
        """
        seen: dict[str, Any] = {}
        for frame in reversed(frames):
            names = names_in(frame)
            seen |= {
                name: names[name]
                for name, code in self.asked.items()
                if code is frame.f_code and name in names and is_variable(name, code)
            }
        self.now = {**self.given, **seen, **{name: self.given[name] for name in carry}}
        if lost := sorted(self.asked.keys() - self.now.keys()):
            pairs = ", ".join(f"{name!r}: {name}" for name in lost)
            checks.note(
                f"{', '.join(lost)}, which resume() asks for, cannot be seen from step(); "
                f"give it carry={{{pairs}}}"
            )


def is_made_here(name: str, frame: types.FrameType) -> bool:
    """Whether the loop around that line binds it anew, or all of the function's call does."""
    loops = [*loops_of(frame, parsed_file(frame.f_code.co_filename))]
    return name in loops[-1].made_anew if loops else frame.f_code.co_name != "<module>"


def is_plain(value: Any) -> bool:
    """Whether a checkpoint gives it back as it was."""
    kind = type(value)
    if kind in (list, tuple, set, dict, OrderedDict):
        return all(map(is_plain, (*value, *(value.values() if isinstance(value, dict) else ()))))
    known = kind in (type(None), bool, int, float, complex, str, bytes)
    return known or kind.__module__ in ("torch", "torch.nn.parameter", "numpy")


# Of a dict with something else in it, and of an object of the script's own, the plain part is saved
# and put back into the one that the resumed script has made: no code of a stranger is pickled.
_IN_PLACE = "is put in place"
_LEFT = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def attributes(value: Any) -> dict[Any, Any] | None:
    """Or a dict's entries; None of what keeps, or may keep, something elsewhere."""
    kind = type(value)
    if kind is dict:
        return value  # type: ignore[no-any-return]
    # The state of a built-in that it is made of takes up room beside its __dict__.
    is_bare = (kind.__basicsize__, kind.__itemsize__) == (CarriedLocals.__basicsize__, 0)
    has_more = hasattr(kind, "state_dict") or any(vars(k).get("__slots__") for k in kind.__mro__)
    return vars(value) if is_bare and is_own(value) and not has_more else None


def holders(value: Any) -> list[Any]:
    """What has attributes of these: the value, and those that it holds."""
    parts = attributes(value)
    within = () if parts is None else (value, *parts.values())
    return [each for each in within if attributes(each) is not None]


def plain_part(path: str, value: Any, begun: Mapping[int, Any], watched: set[int]) -> Any:
    """Of what resume() was given; of another object nobody knows who else holds it."""
    if is_plain(value):
        return value
    parts = attributes(value)
    if parts is None or id(value) not in begun or not is_plain([*parts]):
        raise CheckpointError(
            f"{path} is a {type(value).__name__}, and resume() gives back numbers, texts and "
            "tensors, lists, tuples, sets and dicts of them, and what an object or a dict of the "
            "script, the same that it was given, has of these"
        )
    kept = {n: v for n, v in parts.items() if not isinstance(v, _LEFT)}
    kept = {n: v for n, v in kept.items() if id(unwrapped(v)) not in watched}
    return {_IN_PLACE: {n: plain_part(f"{path}.{n}", v, begun, watched) for n, v in kept.items()}}


def put_in_place(value: Any, saved: Any) -> Any:
    if type(saved) is not dict or [*saved] != [_IN_PLACE]:
        return saved
    parts = attributes(value)
    if parts is None:
        raise CheckpointError(f"what was saved of an object does not fit a {type(value).__name__}")
    values = {name: put_in_place(parts.get(name), v) for name, v in saved[_IN_PLACE].items()}
    for name in [name for name, v in parts.items() if is_plain(v) and name not in values]:
        del parts[name]
    parts.update(values)
    return value


def names_in(frame: types.FrameType) -> dict[str, Any]:
    """What is in sight there: its module's names and its locals."""
    own = frame.f_locals
    names = {**frame.f_globals, **own}
    if isinstance(own, dict) and frame.f_code.co_flags & 1 and sys.getrefcount(own) <= 3:
        # A function's, and before Python 3.13 a copy: left full, it would keep the locals alive.
        # Another count is of a script that has called locals() itself, which is this very dict.
        own.clear()
    return names


def is_variable(name: str, code: types.CodeType) -> bool:
    """Of that function: of another one of the same name in its module it knows nothing."""
    own = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
    stores = (each.argval for each in dis.get_instructions(code) if each.opname == "STORE_GLOBAL")
    return name in own or code.co_name.startswith("<") or name in stores


# --- Call sites that are missing ------------------------------------------------------------------

Watched = Mapping[str, list[Any]]
Root = tuple[types.CodeType | None, int]  # where resume() was called
Asked = tuple[list[str], types.CodeType, int]


class CallSiteChecks:
    """What a resume would not find as it was: said once, and kept in each checkpoint.

    In sight is what the script's functions name, from the one under way up to the one that called
    resume(). What is in sight of resume() and fits into watch() is watched. Of the rest, and of
    what a watched model has beside its state_dict, it is compared from save to save whether it
    moves. What the loops lack is seen in the script's text.
    """

    def __init__(self, watched: Watched, loop: Loop, carried: CarriedLocals) -> None:
        self.seen = False  # the first step
        self.reads_behind = False  # the script, behind the loop over batches, what it left
        self.root: Root = (None, 0)  # that called resume()
        self._watched, self._loop, self._carried = watched, loop, carried
        self._notes: list[str] = []
        self._text = ScriptText([], self.root, set())
        self._known = Known({kind: [] for kind in KINDS})
        self._probes: dict[tuple[str, int], list[Probe]] = {}
        self._first: dict[Any, Any] = {}  # what a probe read first
        self._switches: dict[Switch, Any] = {}  # as the script sets them before resume()
        self._stepped: dict[int, Callable[[], Any]] = {}
        self._hook: Any = None
        self._epoch: Any = None  # as of the last look

    def note(self, sentence: str) -> None:
        if sentence not in self._notes:
            self._notes.append(sentence)
            say(f"a resume will not be exact: {sentence}")

    @fenced
    def see_at_resume(self) -> None:
        frames = script_frames()
        self.root = frames[0].f_code, frames[0].f_lineno
        self._switches = switches(self._watched["model"])
        things = in_sight(frames, self._text)
        for kind, _, thing in [*unwatched(self._watched, things)]:
            if kind == "generator" or type(thing).__module__.startswith("torch."):
                self._watched[kind].append(thing)
        for path in (path for path, thing in things.items() if is_iterator(thing)):
            self.note(f"`{path}` was made before resume(); call resume() before iter()")

    @fenced
    def see_at_step(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        stepped = self._stepped
        self._hook = register_hook(
            register_optimizer_step_post_hook,
            lambda optimizer, *_: stepped.update({id(optimizer): weakly(optimizer)}),
        )
        if self.root[0] is None:
            self.note("resume() is never called; add obs.resume() before the loop")
        self._known = Known(self._watched)
        frames = script_frames(self.root[0])
        asked, loop = {*self._carried.asked, *self._carried.given}, self._loop
        skips = loop.epoch is not None, loop.batches > 0
        self._text = ScriptText(frames, self.root, asked, skips)
        for sentence in self._text.lacks(names_of_watched(frames, self._watched)):
            self.note(sentence)
        for name in sorted(self._text.behind - self._carried.given.keys()):
            self.note(f"`{name}` changes behind step(); make that the last line of the iteration")
        self.reads_behind = bool(self._text.left)
        self.look(frames)

    def end(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    @fenced
    def look(self, frames: Sequence[types.FrameType]) -> None:
        """On the loop's thread: who is there, and how far the loaders are."""
        if not self.seen:
            return  # a resumed run saves before its first step
        things = in_sight(frames, self._text)
        self._epoch, loop = self._loop.epoch, self._loop
        began = self._first.setdefault("the first epoch", self._epoch)
        for path, thing in things.items():
            if path in self._text.epochs_used and is_generator(thing):
                self.note(f"`{path}` is made within the epoch; make it before resume() and seed it")
            lives_on = ask(thing, "_iterator")  # of a loader whose workers persist
            reader = thing if is_iterator(thing) else lives_on
            elsewhere = reader and reader._num_yielded - loop.batches not in (0, 1)
            if lives_on and (elsewhere or self._epoch != began):
                self.note(f"the workers of `{path}` live on; give it persistent_workers=False")
            elif elsewhere:
                self.note(_PLACE.format(path))
        stepped = [optimizer for get in self._stepped.values() if (optimizer := get())]
        for sentence in missing_in_watch(self._watched, things, stepped, self._known):
            self.note(sentence)
        before, self._probes = self._probes, {}
        for path, thing in [*things.items(), *self._known.models.items()]:
            at = (path, id(thing))  # to look through a large model takes milliseconds
            old = None if collected(thing) else before.get(at)
            self._probes[at] = old or [*probes(path, thing, self._known)]

    def switched(self) -> dict[Switch, Any]:
        """What the script has switched since, for a resumed run to begin with."""
        first, now = self._switches, switches(self._watched["model"])
        return {at: value for at, value in now.items() if first.get(at, value) != value}

    def report(self) -> dict[str, Any]:
        """For state.json, at each save."""
        self.compare()
        return {"inexact": self._notes}

    @fenced
    def compare(self) -> None:
        """Behind the loop, for to read a state may wait for its device."""
        for probe in [probe for some in self._probes.values() for probe in some]:
            of_epoch = probe.path.partition(".")[0] in self._text.epochs_own
            at, now = (probe.path, self._epoch if of_epoch else None), probe.read()
            moves = self._first.setdefault(at, now) != now and now not in (None, [])
            if moves and not probe.is_given(self._text.made_anew):
                self.note(f"`{probe.path}` moves and is in no checkpoint; {probe.advice}")


def weakly(value: Any) -> Callable[[], Any]:
    """To look keeps nothing alive; but for what is of a kind that cannot be, and small."""
    return weakref.ref(value) if type(value).__weakrefoffset__ else lambda: value


# What is in sight.


_INERT = (int, float, str, bytes, type(None), type, types.FunctionType, types.ModuleType)
_NOT_STRANGE = frozenset({"torch", "numpy", __name__, *sys.stdlib_module_names} - {"__main__"})


def in_sight(frames: Sequence[types.FrameType], text: ScriptText) -> dict[str, Any]:
    """What has a state, by the names that lead there, the shortest first."""
    found, seen = dict[str, Any](), set[int]()
    names = {name: value for frame in reversed(frames) for name, value in names_in(frame).items()}
    todo = deque((name, value, 3) for name, value in names.items())
    while todo and len(seen) < 5000:
        path, value, depth = todo.popleft()
        if isinstance(value, _INERT) or id(value) in seen or path in text.made_anew:
            continue
        seen.add(id(value))
        if has_state(value) or (path in text.tested and is_own(value)):
            found[path] = value
        if depth:
            todo.extend((path + name, part, depth - 1) for name, part in parts_of(value))
    return found


def has_state(value: Any) -> bool:
    """By its class: to ask the object itself may run a stranger's property."""
    known = hasattr(type(value), "state_dict") or is_generator(value) or is_iterator(value)
    return known or bool(collected(value)) or drives(value)


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Of a collection, of what feeds a loop, and of a stranger's object."""
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        named = ((key, part) for key, part in pairs if isinstance(key, str | int))
        yield from ((f"[{key!r}]", part) for key, part in itertools.islice(named, 64))
    elif is_strange(value) or drives(value):
        is_model = hasattr(type(value), "forward")  # its modules are not looked into
        own = [(name, part) for name, part in vars(value).items() if name[0] != "_" or not is_model]
        yield from ((f".{name}", part) for name, part in own)


def is_strange(value: Any) -> bool:
    """Neither torch's nor of the standard library."""
    root = type(value).__module__.partition(".")[0]
    return root not in _NOT_STRANGE and hasattr(value, "__dict__")


def is_own(value: Any) -> bool:
    """An object of the script's own."""
    file = getattr(sys.modules.get(type(value).__module__), "__file__", None) or ""
    return is_strange(value) and "site-packages" not in file


def drives(value: Any) -> bool:
    """Whether it gives batches, or sets the optimizer: of torch's data, or the script's own."""
    data, kind = torch_module().utils.data, type(value)
    if not is_strange(value):
        return isinstance(value, data.DataLoader | data.Sampler | data.Dataset)
    names = ("__iter__", "__next__", "__getitem__", "next_batch", "get_batch")
    sets = hasattr(kind, "step") and "optimizer" in vars(value)
    return is_own(value) and (sets or any(hasattr(kind, name) for name in names))


def is_iterator(value: Any) -> bool:
    return type(value).__name__.endswith("DataLoaderIter")


def ask(value: Any, name: str) -> Any:
    """None where neither the object nor its class names it: a stranger may answer to all."""
    known = hasattr(type(value), name) or name in getattr(value, "__dict__", ())
    return getattr(value, name, None) if known else None


def is_generator(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    own = isinstance(value, (random.Random, torch_module().Generator, *kinds))
    return own and not isinstance(value, random.SystemRandom)


def collected(value: Any) -> list[Any]:
    """The first tensors of a collection of them, as an average has."""
    if not isinstance(value, dict | list | tuple):
        return []
    few = [*itertools.islice(value.values() if isinstance(value, dict) else value, 3)]
    return few if all(isinstance(each, torch_module().Tensor) for each in few) else []


# What should be watched.


class Known:
    """What is watched, when the first step is made."""

    def __init__(self, watched: Watched) -> None:
        models = [model for model in watched["model"] if hasattr(model, "named_modules")]
        self.models = {f"{type(m).__name__}{at or ''}": m for at, m in enumerate(models)}
        tensors = [tensor for model in models for tensor in tensors_of(model)]
        self.shapes = {tensor.shape for tensor in tensors}
        self.ids = {*map(id, tensors), *ids_of(watched)}


def ids_of(watched: Watched) -> set[int]:
    things = [thing for kind in KINDS for thing in watched[kind]]
    return {id(each) for thing in things for each in (thing, inner(thing))}


def unwatched(watched: Watched, things: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The kind, the name and the thing, of what fits into watch() beside models."""
    every, known = [*watched["scheduler"], *things.values()], ids_of(watched)
    known |= {id(part) for thing in every for part in ask(thing, "_schedulers") or ()}
    for path, thing in things.items():
        if known.isdisjoint((id(thing), id(inner(thing)))):
            if is_generator(thing):
                yield "generator", path, thing
            yield from ((kind, path, thing) for kind in kinds_of(thing))


def kinds_of(thing: Any) -> list[str]:
    if not ask(thing, "load_state_dict") or ask(thing, "_enabled") is False:
        return []
    return [kind for kind, mark in _MARKS.items() if ask(thing, mark) is not None]


_MARKS = {"optimizer": "param_groups", "scheduler": "last_epoch", "scaler": "unscale_"}


def missing_in_watch(
    watched: Watched, things: Mapping[str, Any], stepped: Sequence[Any], known: Known
) -> Iterator[str]:
    if not watched["model"]:
        yield "no model is watched; add obs.watch(model, optimizer=…)"
    optimizers = [inner(optimizer) for optimizer in watched["optimizer"]]
    for optimizer in stepped:
        if not any(optimizer is each for each in optimizers):
            yield f"an unwatched {type(optimizer).__name__} steps; add it to watch(optimizer=[…])"
    found = [(kind, path) for kind, path, _ in unwatched(watched, things)]
    for kind, path in found:
        if kind in ("scheduler", "scaler"):
            yield f"`{path}` is not watched; add watch({kind}={path}) before resume()"
    driven = {id(inner(ask(each, "optimizer"))) for each in watched["scheduler"]}
    for optimizer in () if "scheduler" in dict(found) else optimizers:
        step = getattr(optimizer, "step", None)
        if hasattr(step, "_wrapped_by_lr_sched") and id(optimizer) not in driven:
            yield "a scheduler drives the optimizer and is not watched; add watch(scheduler=…)"
    groups = [group for each in optimizers for group in getattr(each, "param_groups", ())]
    if lost := sum(id(p) not in known.ids for group in groups for p in group["params"]):
        yield f"{lost} parameters of the optimizer are in no watched model; watch that too"


def inner(optimizer: Any) -> Any:
    """The optimizer within a wrapper of accelerate, of a scaler, or of the script."""
    is_scheduler = ask(optimizer, "last_epoch") is not None
    within = None if is_scheduler else ask(optimizer, "optimizer")
    return optimizer if within is None else inner(within)


# What moves.


class Probe(NamedTuple):
    """Reads a state that no checkpoint has; None or nothing where it is gone."""

    path: str
    read: Callable[[], Any]
    advice: str
    kind: type = object  # for an attribute, of what
    name: str = ""

    def is_given(self, made_anew: set[str]) -> bool:
        """Whether the attribute comes from the script, and not from what it was before."""
        if not self.name or any(path.endswith(f".{self.name}") for path in made_anew):
            return bool(self.name)
        functions = [f for c in self.kind.__mro__ for n, f in vars(c).items() if n != "__init__"]
        codes = [f.__code__ for f in functions if isinstance(f, types.FunctionType)]
        uses = [[i.opname for i in dis.get_instructions(c) if i.argval == self.name] for c in codes]
        return not any(ops[:1] == ["LOAD_ATTR"] and "STORE_ATTR" in ops for ops in uses)


def probes(path: str, thing: Any, known: Known) -> Iterator[Probe]:
    if path in known.models:
        for at, module in thing.named_modules(prefix=path):
            for name in module._non_persistent_buffers_set:
                read = reader(module, lambda of, name: printed([getattr(of, name, None)]), name)
                yield Probe(f"{at}.{name}", read, "make it a persistent buffer")
    elif id(thing) in known.ids:
        return
    elif is_generator(thing):
        yield Probe(path, reader(thing, text_of), f"add watch(generator={path}) before resume()")
    elif hasattr(type(thing), "named_buffers"):
        if own := [tensor for tensor in tensors_of(thing) if id(tensor) not in known.ids]:
            yield Probe(path, values_of([*own[:3], own[-1]]), f"add obs.watch({path})")
    elif tensors := collected(thing):
        if all(t.shape in known.shapes and id(t) not in known.ids for t in tensors):
            yield Probe(path, values_of(tensors), "keep it in a Module, and watch that")
    elif drives(thing) or is_own(thing):
        yield from numbers_of(path, thing)


def numbers_of(path: str, thing: Any) -> Iterator[Probe]:
    keeps = ask(thing, "load_state_dict") and not ask(thing, "named_buffers")
    advice = f"add watch(loader={path})" if keeps else "carry it, or make it a buffer of a model"
    for name, value in list(getattr(thing, "__dict__", {}).items()):
        if type(value) in (int, float, bool, type(None)):
            read = reader(thing, getattr, name, None)
            yield Probe(f"{path}.{name}", read, advice, type(thing), name)


def reader(thing: Any, read: Callable[..., Any], *names: Any) -> Callable[[], Any]:
    get = weakly(thing)
    return lambda: None if (there := get()) is None else read(there, *names)


def text_of(generator: Any) -> str:
    state = generator_state(generator)
    return str(getattr(state, "tolist", lambda: state)())


def values_of(tensors: Sequence[Any]) -> Callable[[], Any]:
    refs = [weakref.ref(tensor) for tensor in tensors]
    return lambda: printed([ref() for ref in refs])


def printed(tensors: Sequence[Any]) -> list[Any]:
    """A few values of each."""
    return [t.detach().reshape(-1)[:4].tolist() for t in tensors if t is not None]


def tensors_of(module: Any) -> list[Any]:
    return [*module.parameters(), *module.buffers()]


# What the loops lack, by the script's text.

_SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Lambda)


class ScriptLoop:
    """A loop around the step, and around no call of resume()."""

    def __init__(self, node: Any, frame: types.FrameType, tree: Any) -> None:
        self.node, self.is_outermost, self.is_innermost = node, False, False
        self.code, self.line = frame.f_code, frame.f_lineno  # that is under way
        self.place = f"line {node.lineno} of {Path(frame.f_code.co_filename).name}"
        head = node.target if isinstance(node, ast.For) else node.test
        uses = [use for part in (head, *node.body) for use in uses_in(part)]
        first = dict(reversed(uses))
        self.made_anew = {name for name, binds in first.items() if binds}
        self.used = {name for name, _ in uses}
        self.carried = {name for name, binds in uses if binds} - self.made_anew
        last = max(line or 0 for _, _, line in self.code.co_lines())
        behind = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.lineno <= last]
        self.left = self.made_anew & {n.id for n in behind if n.lineno > node.end_lineno}
        self.own = [*nodes_of(node)]  # not those of a loop within
        later = [part for part in self.own if getattr(part, "lineno", 0) > self.line]
        uses = [use for part in later for use in uses_in(part)]
        self.behind = {name.rpartition(".")[2] for name, binds in uses if binds}
        self.skips = [each.lineno for each in self.own if called(each) in _SKIPS]
        calls: list[Any] = [each for each in ast.walk(node) if called(each) == "next"]
        tests = [each.test for each in ast.walk(node) if isinstance(each, ast.If | ast.While)]
        self.tested = {name for test in tests for name in names_of(test)} - {"self"}
        of = [each.args[0] for each in calls if each.args and isinstance(each.args[0], ast.Name)]
        self.taken = [(each.id, each.lineno) for each in of]  # by next(), and where

    @property
    def over(self) -> set[str]:
        return names_of(self.node.iter) if isinstance(self.node, ast.For) else set()

    def has(self, root: Root) -> bool:
        """Whether resume() is called in it, and not by way of its skip."""
        within = self.node.lineno <= root[1] <= self.node.end_lineno
        return self.code is root[0] and within and root[1] not in self.skips


_SKIPS = ("skip_epoch", "skip_batch", "ended")
_PLACE = "the place of `{}` is not kept; loop over its loader, and begin with skip_batch()"


class ScriptText:
    """What the script's text tells of the loops around the step."""

    def __init__(
        self,
        frames: Sequence[types.FrameType],
        root: Root,
        asked: set[str],
        skips: tuple[bool, bool] = (False, False),
    ) -> None:
        """`skips` tells which are called, wherever they stand: skip_epoch() and skip_batch()."""
        self.loops: list[ScriptLoop] = []  # the outermost first
        self.asked = asked  # what the loops are given back
        for frame in reversed(frames):
            tree = parsed_file(frame.f_code.co_filename)
            self.asked |= asked_in(tree)
            self.loops += loops_of(frame, tree)
        for at, loop in enumerate(self.loops):
            loop.is_outermost, loop.is_innermost = not at, at == len(self.loops) - 1
        self.loops = [loop for loop in self.loops if not loop.has(root)]
        innermost = self.loops[-1:]
        for loop in self.loops:
            if skips[loop.is_innermost] and not loop.skips:
                loop.skips.append(loop.node.lineno)
        self.behind = {name for loop in innermost for name in loop.behind} & asked
        self.made_anew = asked | {f".{name}" for name in asked}  # by each iteration
        self.made_anew |= {name for loop in innermost for name in loop.made_anew}
        self.epochs_own = {name for loop in self.loops[:-1] for name in loop.made_anew}
        self.epochs_used = {name for loop in innermost for name in loop.used} & self.epochs_own
        self.tested = {name for loop in self.loops for name in loop.tested}
        self.left = {name for loop in innermost for name in loop.left} - asked

    def lacks(self, watched: set[str]) -> Iterator[str]:
        known = self.asked | watched
        return (s for loop in self.loops for rule in LOOP_RULES for s in rule(loop, known))


def names_of_watched(frames: Sequence[types.FrameType], watched: Watched) -> set[str]:
    """`model = model.train()` names again what is saved anyway."""
    sights = [dict(names_in(frame)) for frame in frames]
    sights += [vars(sight["self"]) for sight in sights if hasattr(sight.get("self"), "__dict__")]
    known = ids_of(watched)
    return {name for sight in sights for name, value in sight.items() if id(value) in known}


def loops_of(frame: types.FrameType, tree: Any) -> Iterator[ScriptLoop]:
    for node in (each for each in ast.walk(tree) if isinstance(each, _LOOPS)):
        if frame.f_code.co_firstlineno <= node.lineno <= frame.f_lineno <= (node.end_lineno or 0):
            yield ScriptLoop(node, frame, tree)


def asked_in(tree: Any) -> set[str]:
    """What resume() and `carry` name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    carry = [word.value for call in calls for word in call.keywords if word.arg == "carry"]
    given = [*carry, *(call for call in calls if called(call) == "resume")]
    return {name.rpartition(".")[2] for node in given for name in names_of(node)}


def nodes_of(node: Any) -> Iterator[Any]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (*_LOOPS, *_SCOPES)):
            yield from nodes_of(child)


def called(node: Any) -> str:
    function = getattr(node, "func", None)
    return str(getattr(function, "attr", getattr(function, "id", "")))


def uses_in(node: Any) -> list[tuple[str, bool]]:
    """The names that it reads or binds (True), attributes too, in the order in which it does."""
    if isinstance(node, _SCOPES):
        return []
    children = [*ast.iter_child_nodes(node)]
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):  # bound after the value
        children.sort(key=getattr(node, "targets", [getattr(node, "target", None)]).__contains__)
    uses = [use for child in children for use in uses_in(child)]
    if isinstance(node, ast.Name | ast.Attribute):
        uses.append((ast.unparse(node), isinstance(node.ctx, ast.Store)))
    elif isinstance(node, ast.AugAssign):
        uses[:0] = [(name, False) for name in names_of(node.target)]
    elif hasattr(node, "generators"):  # has names of its own
        own = {name for name, binds in uses if binds}
        uses = [use for use in uses if use[0] not in own]
    return uses


def names_of(node: Any) -> set[str]:
    return {name for name, _ in uses_in(node)}


def without_skip(loop: ScriptLoop, asked: set[str]) -> Iterator[str]:
    """Of a loop between the two the batches are counted on."""
    goes_on = asked if isinstance(loop.node, ast.While) else asked & loop.over
    if (loop.is_outermost or loop.is_innermost) and not (loop.skips or goes_on):
        of_epochs = loop.is_outermost and "range" in loop.over
        call = "skip_batch()" if loop.is_innermost and not of_epochs else "skip_epoch(…)"
        yield f"the loop at {loop.place} does not begin with `if obs.{call}: continue`"


def unpassed_next(loop: ScriptLoop, asked: set[str]) -> Iterator[str]:
    """A resumed run passes over the batches that a loop gives, not over those that it takes."""
    for name, line in loop.taken:
        if name not in loop.made_anew and not any(skip > line for skip in loop.skips):
            yield _PLACE.format(name)


def not_carried(loop: ScriptLoop, asked: set[str]) -> Iterator[str]:
    nodes: list[Any] = [*ast.walk(loop.node)]
    shuffled = {ast.unparse(n.args[0]) for n in nodes if called(n) == "shuffle" and n.args}
    clock: set[str] = set()  # what comes of the time is never exact
    for node in [each for each in nodes if isinstance(each, ast.Assign | ast.AugAssign)] * 2:
        if names_of(node.value) & {"time", "perf_counter", *clock}:
            clock |= {name for name, binds in uses_in(node) if binds}
    names = {name for name in loop.carried if "." not in name or name.startswith("self.")}
    names |= {name for name in shuffled if name.isidentifier() and name not in loop.made_anew}
    names -= clock | {name for name, _ in loop.taken}
    lost = [name for name in sorted(names) if name.rpartition(".")[2] not in asked]
    if lost and loop.is_outermost:
        keys = ", ".join(f"{name.rpartition('.')[2]}={name}" for name in lost)
        yield f"the loops go on from {', '.join(lost)}; add {', '.join(lost)} = obs.resume({keys})"


def done_again(loop: ScriptLoop, asked: set[str]) -> Iterator[str]:
    """By a resumed run, on its way to the loop within."""
    first = math.inf if loop.is_innermost else min(loop.skips, default=math.inf)
    given_again = any(called(node) == "resume" for node in loop.own)
    for node in loop.own:
        if first < getattr(node, "lineno", 0) < loop.line:
            steps = (
                called(node) == "step" and not node.args and "sched" in ast.unparse(node).lower()
            )
            counts = isinstance(node, ast.AugAssign) and names_of(node.target) & asked
            if steps or (counts and not given_again):
                text = ast.unparse(node)
                yield f"`{text}` is done again on the way back; put it behind the loop within"


LOOP_RULES = (without_skip, unpassed_next, not_carried, done_again)


# --- Which run is gone on with --------------------------------------------------------------------


class Plan(NamedTuple):
    """What a wish to resume comes to."""

    run_dir: Path | None  # to go on in; None for a new run that forks from the checkpoint
    source: Path  # a directory of checkpoints, or the one that is to be taken
    run_id: str = ""  # of the checkpoints that count there


def find_plan(run: Run, wish: str) -> Plan | None:
    """None where nothing is there to resume. Raises CheckpointError, RunError, OSError."""
    out, family = script_dir() / run.settings.out_dir, run.header["family"]
    if wish != "auto":
        path = Path(wish)
        if (path / "config.json").exists():
            refuse_alive(path)
            return plan_of(path) or no_checkpoint(path)
        if (path / "state.json").exists():
            return Plan(None, path)
        return fork_from(path) or no_checkpoint(path)
    family_runs = members(out, family)
    for member in family_runs:
        refuse_alive(member)
    for member in family_runs:
        if member in _completed and is_completed(member):
            raise RunError(
                f"{member} was completed by this same process; give each run of a process a name "
                "of its own, or a resume could not tell them apart"
            )
        if (plan := plan_of(member)) is not None:
            return plan
        say(f"{member} holds no checkpoint; it is left as it is")
    if not run.saving.ckpt_dir:
        return None
    # Of another tool, or of a run whose directory is gone.
    known = [config["id"] for _, config in runs_in(out)]
    return fork_from(script_dir() / run.saving.ckpt_dir, known)


def refuse_alive(run_dir: Path) -> None:
    if alive(run_dir):
        os.close(lock_run(run_dir / ".lock"))  # which raises, and says who


def no_checkpoint(path: Path) -> Plan:
    raise CheckpointError(f"{path} holds no checkpoint; give the directory of a run or of a step")


def fork_from(source: Path, known: Sequence[str] = ()) -> Plan | None:
    """A new run, from the newest checkpoint in a directory that is of no known run."""
    found = [state.get("run_id", "") for _, state in checkpoints(source)]
    ids = [run_id for run_id in found if run_id not in known]
    return Plan(None, source, next(filter(None, ids), "")) if ids else None


def runs_in(out: Path, family: str = "") -> Iterator[tuple[Path, dict[str, Any]]]:
    """The runs there, or those that may be of a family, each with its config.json.

    Raises DamageError, OSError.
    """
    pattern = re.compile(rf"{re.escape(family)}(-\d+)?" if family else ".*")
    for path in out.iterdir() if out.is_dir() else ():
        # The script's own folders may lie there too, with a config.json of theirs.
        is_ours = any((path / n).exists() for n in ("run_manifest.json", "checkpoints/latest"))
        if is_ours and pattern.fullmatch(path.name):
            yield path, read_sealed(path / "config.json")


def members(out: Path, family: str) -> list[Path]:
    """The runs of that name, or without one of this script, the newest first.

    Raises CheckpointError where one is another script's, DamageError, OSError.
    """
    found = []
    script = os.path.relpath(script_path(), out)
    for path, config in runs_in(out, family):
        if config["family"] == family if family else config["script"] == script:
            if config["script"] != script:
                raise CheckpointError(
                    f"{path} is a run of {config['script']}, this script is {script}; "
                    "give the run another name"
                )
            number = path.name.removeprefix(family).removeprefix("-") if family else ""
            found.append((config["created"], int(number or 0), path))
    return [path for *_, path in sorted(found, reverse=True)]


def plan_of(run_dir: Path) -> Plan | None:
    """To go on in that run; None where it holds no checkpoint."""
    config = read_sealed(run_dir / "config.json")
    source = run_dir / config["checkpoints"]
    own = [
        path for path, state in checkpoints(source) if state.get("run_id") in (config["id"], None)
    ]
    aside = any(source.glob(".corrupt-step_*"))
    return Plan(run_dir, source, config["id"]) if own or aside else None


def is_completed(run_dir: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, DamageError):
        return read_sealed(run_dir / "results.json").get("status") == "completed"
    return False


# What a file, its folder, or the machine may raise: at a wanted resume none of it means "begin".
_REFUSALS = (
    *(OSError, ObservabilityError, MemoryError, RuntimeError),
    *(LookupError, TypeError, ValueError, AttributeError),
)


def as_checkpoint_error(error: BaseException) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"the resume that was asked for cannot be: {error or repr(error)}")


class Decision:
    """What rank 0 has decided, for the other ranks: in the store that they have in common, or in a
    file of this launch."""

    WAIT_S = 120.0

    def __init__(self, run: Run) -> None:
        self._out = script_dir() / run.settings.out_dir
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        launch = "|".join([run.header["family"], *(os.environ.get(name, "") for name in names)])
        self._path = self._out / f".launch-{zlib.crc32(launch.encode()):08x}.json"
        self._store = distributed_store()

    def publish(self, checkpoint: Path | None, directory: Path | None, refusal: str) -> None:
        """What is resumed from, and where the run's checkpoints are to lie."""
        facts = {
            "refusal": refusal,
            "checkpoint": checkpoint and os.path.abspath(checkpoint),
            "directory": directory and os.path.abspath(directory),
            "began": process_began(os.getpid()),
            **this_process(),
        }
        make_dirs(self._out)
        replace_file(self._path, seal(facts))
        if self._store is not None:
            self._store.set(self._path.stem, json.dumps(facts))

    def _read(self) -> dict[str, Any]:
        """Of a process that lives: what an earlier launch has left is never believed."""
        if self._store is not None:
            known = self._store.check([self._path.stem])
            return dict(json.loads(self._store.get(self._path.stem))) if known else {}
        with contextlib.suppress(OSError, DamageError):
            facts = read_sealed(self._path)
            began = process_began(facts["pid"]) if facts["host"] == platform.node() else None
            return facts if began == facts["began"] is not None else {}
        return {}

    def wait_for(self, fact: str) -> dict[str, Any]:
        until = time.monotonic() + self.WAIT_S
        while not ((facts := self._read()).get(fact) or facts.get("refusal")):
            if time.monotonic() > until:
                raise CheckpointError(
                    f"rank 0 has not said within {self.WAIT_S:g} s what to resume from; let each "
                    "rank call resume(), and after init_process_group() where they have hosts"
                )
            time.sleep(0.02)
        if facts["refusal"]:
            raise CheckpointError(facts["refusal"])
        return facts


def distributed_store() -> Any:
    """What the processes of a launch have in common, on whatever hosts; None before they meet."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return getattr(distributed.distributed_c10d, "_get_default_store", lambda: None)()


def process_began(pid: int) -> str | None:
    """When, in the kernel's ticks: another process of the same id began at another time."""
    return next(iter(proc(f"{pid}/stat").rpartition(")")[2].split()[19:20]), None)


def load_newest(plan: Plan, watched: Watched) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The newest checkpoint whose every byte checks, loaded into what is watched.

    A damaged one is set aside and the next older one is taken. Raises CheckpointError when not one
    is good: a run must not silently start at step 0 over them; OSError for one that cannot be read.
    """
    if (plan.source / "state.json").exists():
        check_state(plan.source, read_state(plan.source))
        return plan.source, *restore(plan.source, watched)
    for path, state in checkpoints(plan.source):
        if state.get("run_id", plan.run_id) != plan.run_id:
            continue
        try:
            check_state(path, state)
            return path, *restore(path, watched)
        except DamageError as error:
            say(f"checkpoint {path} is damaged ({error}); the next older one is taken")
            if plan.run_dir == plan.source.parent:  # else it may be another run's
                os.rename(path, path.with_name(f".corrupt-{path.name}-{time.time_ns()}"))
    raise CheckpointError(
        f"no checkpoint in {plan.source} is whole; restore one from a backup, or "
        "remove them to start again at step 0"
    )


def differences(state: Mapping[str, Any], run: Run, optimizers: Any) -> list[str]:
    """What is not as it was, each with both values, and which of them now holds."""
    now = {**numerics(), "hyperparameters": run.header["config"]}
    groups = [group for each in optimizers for group in each.get("param_groups", ())]
    found = []
    for name, old, new in changed(state, to_json(now)):
        kept = any(group.get(name) == old for group in groups)
        whose = "the checkpoint's holds" if kept else "the new one holds"
        found.append(f"{name} was {old!r}, is {new!r} ({whose})")
    return found


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each name that both have with another value, or that one of two configurations lacks."""
    for name in now.keys() - {"resume", "ckpt_dir", "keep_last_checkpoints", "save_interval"}:
        old, new = then.get(name), now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changed({**dict.fromkeys(new), **old}, {**dict.fromkeys(old), **new})
        elif old != new:
            yield name, old, new


def own_generators(path: Path, rank: int, checks: CallSiteChecks) -> dict[str, Any]:
    """A rank above 0 has its generators in a checkpoint of its own, of the same step."""
    if not rank:
        return {}
    own = path.parent / f"rank{rank}" / path.name
    if checkpoint_damage(own) is None:
        return dict(load_file(own, "rng_state.pt"))
    checks.note(f"{path} is without the generators of rank {rank}")
    return {**rng_state(()), "start": rng_state(())}


# --- Checkpoints: on disk -------------------------------------------------------------------------

_STEP = re.compile(r"step_\d{8,}")
_PIECE = 32 << 20  # bytes that have a checksum: pieces are read and checked side by side
_CHUNK = 4 << 20  # bytes for one write or read: each lets go of the GIL for about a millisecond


class CheckpointStore:
    """Step directories under one directory: `commit` adds one, whole or not at all."""

    def __init__(self, directory: str | Path, run_id: str = "", keep_last: int = 3) -> None:
        self.directory, self.keep_last = Path(directory), max(1, keep_last)
        self.keep: set[Path] = set()  # never deleted by this run
        self._run_id = run_id
        make_dirs(self.directory)
        self._sequence = max((s.get("sequence", 0) for _, s in checkpoints(directory)), default=0)
        for left in self.directory.glob(".tmp-*"):  # of killed processes; a live one holds its lock
            with contextlib.suppress(OSError), locked(left):
                shutil.rmtree(left, ignore_errors=True)

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def commit(
        self,
        step: int,
        files: Mapping[str, Any],
        state: Callable[[], dict[str, Any]],
        check: Callable[[Path], Any] = lambda staging: None,
    ) -> Path:
        """Write `files` and `state.json` as `step_…`; when this returns, a power cut keeps them.

        A file is bytes, the path of one to copy, or a `Frozen` state. What `check` raises of the
        finished files is raised. Raises OSError with nothing left behind and every older
        checkpoint as it was.
        """
        final = self.path(step)
        self._refuse_a_strangers(final)
        make_dirs(self.directory)
        staging = self._hidden(final)
        staging.mkdir()
        try:
            with locked(staging):
                sums = {
                    name: write_file(staging / name, content) for name, content in files.items()
                }
                check(staging)
                self._sequence += 1
                facts = {**state(), "run_id": self._run_id, "sequence": self._sequence}
                write_file(staging / "state.json", seal(to_json({**facts, "files": sums})))
                sync_dir(staging)
                self._remove(final)  # of a history that a resume from further back gave up
                os.rename(staging, final)
                sync_dir(self.directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # which is gone where all went well
        self._retain(final)
        return final

    def _refuse_a_strangers(self, final: Path) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, DamageError):
            if read_sealed(final / "state.json").get("run_id", self._run_id) != self._run_id:
                raise CheckpointError(f"{final} is another run's; give a ckpt_dir of its own")

    def link(self, name: str, path: Path) -> None:
        """A relative link beside the steps; where there are none, it is left out."""
        with contextlib.suppress(OSError):
            temporary = self.directory / f".{name}"
            temporary.unlink(missing_ok=True)
            os.symlink(path.name, temporary)
            os.replace(temporary, self.directory / name)

    def _retain(self, new: Path) -> None:
        own = [p for p, state in checkpoints(self.directory) if state.get("run_id") == self._run_id]
        self.link("latest", own[0])
        best = self.directory / "best"
        keep = {new, *own[: self.keep_last], *self.keep}
        keep.add(best.resolve() if best.is_symlink() else best)
        for path in own:
            with contextlib.suppress(OSError):  # the new one is saved all the same
                if path not in keep and path.resolve() not in keep:
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

    The state of a damaged one is empty, and it comes first, for it may be the newest. Raises
    OSError for what is there and cannot be read.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(directory)
    for path in (Path(directory, name) for name in names if _STEP.fullmatch(name)):
        try:
            found.append((path, read_state(path)))
        except DamageError:
            found.append((path, {}))
    # One that was made at an evaluation is the last to be gone on from, and the first to go.
    found.sort(key=lambda f: (not f[1].get("aside"), f[1].get("sequence", math.inf), f[0].name))
    return found[::-1]


def read_state(path: str | Path) -> dict[str, Any]:
    """state.json of a checkpoint, its checksum verified. Raises DamageError, OSError.

    In the seed's own layout nothing vouches for the four files; the state then has no "files".
    """
    file = Path(path) / "state.json"
    try:
        return read_sealed(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamageError(f"{file} is missing") from error
    except DamageError:
        state = unsealed(file)
        if state is None or "self_crc32" in state or "files" in state:
            raise
    names = ("epoch", "global_step", "step_in_epoch")
    known = {name: state[name] for name in names if type(state.get(name)) is int}
    absent = dict.fromkeys((*_COUNTS, "ended", "broke"), 0) | {"steps": known.get("global_step", 0)}
    none: dict[str, Any] = {
        "epoch": None,
        "best": None,
        "latest_validation": None,
        "loss_history": [],
    }
    inexact = ["nothing vouches for its files"]
    return {**absent, **none, "world_size": 1, "inexact": inexact, **known}


_NEEDED = {"model.pth", "optimizer.pt", "rng_state.pt"}
_COUNTS = ("step_in_epoch", "global_step", "steps", "tokens", "seq", "sequence")


def check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Raises DamageError where it does not say what a resume reads."""
    files = state.get("files", dict.fromkeys(_NEEDED))
    sound = all(type(state.get(name)) is int for name in (*_COUNTS, "world_size"))
    sound = sound and isinstance(state.get("loss_history"), list) and isinstance(files, dict)
    if not sound or not files.keys() >= _NEEDED:
        raise DamageError(f"{path / 'state.json'} lacks what a resume needs")


def unsealed(file: Path) -> dict[str, Any] | None:
    paths = [file.with_name(name) for name in _NEEDED]
    if all(path.is_file() and path.stat().st_size for path in paths):
        with contextlib.suppress(ValueError, RecursionError), open_regular(file) as opened:
            state = json.loads(opened.read(64 << 20))
            return state if isinstance(state, dict) else None
    return None


def latest_ckpt(directory: str | Path) -> Path | None:
    """The newest checkpoint whose every byte checks; None where none was ever saved.

    Raises CheckpointError when there are checkpoints and not one is good; OSError.
    """
    found = [path for path, _ in checkpoints(directory)]
    for path in found:
        if (damage := checkpoint_damage(path)) is None:
            return path
        warn_once(f"checkpoint {path} is damaged ({damage}); the next older one is taken")
    if found or any(Path(directory).glob(".corrupt-step_*")):
        raise CheckpointError(
            f"no checkpoint in {directory} is whole; restore one from a backup, or "
            "remove them to start again at step 0"
        )
    return None


def best_ckpt(directory: str | Path) -> Path | None:
    """The checkpoint of the weights that were evaluated best; None where none were."""
    link = Path(directory) / "best"
    return Path(directory) / os.readlink(link) if link.is_symlink() else None


def is_valid_ckpt(path: str | Path) -> bool:
    """Whether every file has the size and the checksums that were written. Needs no torch."""
    return checkpoint_damage(path) is None


def checkpoint_damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte checks. Raises OSError."""
    try:
        checking = FileChecks(Path(path), read_state(path))
        for name in checking.names:
            checking.wait(name)
    except DamageError as error:
        return str(error)
    return None


class FileChecks:
    """The checksums of a checkpoint's files, read side by side: `wait` is for one file's."""

    def __init__(self, path: Path, state: Mapping[str, Any]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._path, self._pieces = path, {}
        self.names = state.get("files", {})
        if not all(is_entry(name, facts) for name, facts in self.names.items()):
            raise DamageError(f"{path / 'state.json'} lists what cannot be")
        pool = ThreadPoolExecutor(8)
        for name, facts in self.names.items():
            ats = [at * _PIECE for at in range(len(facts["crc32"]))] if self._fits(name) else []
            self._pieces[name] = [pool.submit(sum_piece, path / name, at) for at in ats]
        pool.shutdown(wait=False)

    def _fits(self, name: str) -> bool:
        try:
            facts = os.stat(self._path / name)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(facts.st_mode) and facts.st_size == self.names[name]["size"]

    def wait(self, name: str) -> None:
        """Raises DamageError where the file is not what was written, OSError."""
        if name in self.names:
            found = [piece.result() for piece in self._pieces[name]]
            if found != self.names[name]["crc32"] or not self._fits(name):
                raise DamageError(f"{self._path / name} is not what was written")


def is_entry(name: str, facts: Any) -> bool:
    """Whether that is said of a file beside state.json which is said of one."""
    with contextlib.suppress(TypeError, KeyError):
        return "/" not in name and len(facts["crc32"]) == max(1, -(-facts["size"] // _PIECE))
    return False


def sum_piece(path: Path, at: int) -> str:
    """CRC-32 of a piece of a file: with the size it catches every burst of up to 32 flipped bits,
    and all else but one case in 2^32, at twice the speed of SHA-256. What guards against malice is
    `weights_only`."""
    crc, buffer = 0, memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file, errors_about(path):
        file.seek(at)
        for _ in range(0, _PIECE, _CHUNK):
            count = file.readinto(buffer) or 0
            crc = zlib.crc32(buffer[:count], crc)
    return f"{crc:08x}"


def publish_weights(checkpoint: Path, target: Path) -> None:
    """A copy of a checkpoint's model.pth at `target`, whole or not at all.

    No link: a script that opens it for writing must not write into the checkpoint.
    """
    make_dirs(target.parent)
    staging = target.with_name(f".tmp-{target.name}")
    shutil.copyfile(checkpoint / "model.pth", staging)
    with staging.open("rb+") as file:
        os.fsync(file)
    os.replace(staging, target)
    sync_dir(target.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that dies with its process. Raises BlockingIOError where another one lives."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if not flock(handle):
            raise BlockingIOError(f"{path} is in use by another process")
        yield
    finally:
        os.close(handle)


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Create `path`, durably, and return its entry in state.json."""
    frozen = isinstance(content, Frozen)
    if frozen:
        if shutil.disk_usage(path.parent).free < content.size:  # say so before it is full for all
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        content.write_to(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not frozen:
            write_all(fd, content if isinstance(content, bytes) else content.read_bytes())
        os.fsync(fd)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    return {"size": size, "crc32": [sum_piece(path, at) for at in range(0, max(size, 1), _PIECE)]}


# --- Checkpoints: what they hold ------------------------------------------------------------------


def capture(watched: Watched) -> dict[str, Any]:
    """What to save, by file name, still referring to the live tensors.

    One model is its plain `state_dict()`; several are a dict with the keys "0", "1", …; and
    optimizer.pt has the same for each kind.
    """
    kinds = {kind: [each.state_dict() for each in watched[kind]] for kind in KINDS[:3]}
    kinds["scaler"] = [scaler_state(scaler) for scaler in watched["scaler"]]
    by_kind = {kind: numbered(states) for kind, states in kinds.items() if states}
    return {"model.pth": by_kind.pop("model", {}), "optimizer.pt": by_kind}


Switch = tuple[int, str, str]  # which model, the module or parameter in it, the attribute
_SWITCHES = (bool, int, float, str, type(None))


def switches(models: Sequence[Any]) -> dict[Switch, Any]:
    """What a model has beside its tensors: train or eval, what is frozen, its own numbers."""
    found = dict[Switch, Any]()
    for at, model in enumerate(models):
        for path, module in modules_of(model):
            own = vars(module) if has_numbers(module) else {"training": module.training}
            found |= {(at, path, name): value for name, value in own.items()}
        for path, parameter in model.named_parameters() if found else ():
            found[at, path, "requires_grad"] = parameter.requires_grad
    return {where: value for where, value in found.items() if type(value) in _SWITCHES}


def modules_of(model: Any) -> Iterable[tuple[str, Any]]:
    return model.named_modules() if hasattr(model, "named_modules") else ()


def has_numbers(module: Any) -> bool:
    """Not a wrapper of torch's, whose counters are of its own process."""
    kind = type(module).__module__
    return kind.startswith("torch.nn.modules.") or not kind.startswith("torch.")


def switch(models: Sequence[Any], switched: Mapping[Switch, Any]) -> None:
    modules = [dict(modules_of(model)) for model in models]
    for (at, path, name), value in switched.items():
        if path in modules[at]:
            vars(modules[at][path])[name] = value  # where it was read: a property runs no code
        elif name == "requires_grad":
            models[at].get_parameter(path).requires_grad = value


def numbered(states: Sequence[Any]) -> Any:
    return states[0] if len(states) == 1 else {str(at): state for at, state in enumerate(states)}


def unnumbered(states: Any, count: int) -> list[Any]:
    """Back from `numbered`; what was one stays one where one is watched."""
    if states is None:
        return []
    several_states = isinstance(states, dict) and [*states] == [str(n) for n in range(len(states))]
    return (
        [states] if not several_states or (count == 1 and len(states) != 1) else [*states.values()]
    )


def restore(path: Path, watched: Watched) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a checkpoint into what is watched; return its state and what rng_state.pt holds.

    Every byte is checked before it is used, and while one file is loaded the next is read. Raises
    CheckpointError that lists the names, before anything is changed, for another model.
    """
    state = read_state(path)
    checks = FileChecks(path, state)
    checks.wait("model.pth")
    # load_state_dict copies out of the file; an optimizer on the CPU keeps what it is given.
    weights = unnumbered(load_file(path, "model.pth", mmap=True), len(watched["model"]))
    for model, saved in zip(watched["model"], weights):
        check_names(model.state_dict(), saved, path)
    check_counts(path, {"model": len(weights)}, watched)
    for model, saved in zip(watched["model"], weights):
        model.load_state_dict(saved)
    checks.wait("optimizer.pt")
    groups = [g for o in map(inner, watched["optimizer"]) for g in getattr(o, "param_groups", ())]
    on_cpu = any(p.is_cpu for group in groups for p in group["params"])
    rest = load_file(path, "optimizer.pt", mmap=not on_cpu)
    loaded = {kind: unnumbered(rest.get(kind), len(watched[kind])) for kind in KINDS[1:4]}
    check_counts(path, {kind: len(states) for kind, states in loaded.items()}, watched)
    for kind, states in loaded.items():
        for thing, saved in zip(watched[kind], states):
            load_in_place(thing, saved)
    for name in checks.names:
        checks.wait(name)
    plain: dict[str, Any] = {
        "loader": [],
        "listeners": {},
        "switched": {},
        "carry": places_of(state),
        "start": None,
    }
    rng = {**plain, **load_file(path, "rng_state.pt"), "optimizer": loaded["optimizer"]}
    return state, {**rng, "start": rng["start"] or rng}


def load_in_place(thing: Any, saved: Any) -> None:
    """An optimizer keeps its groups: the script, or one that wraps it, may hold them too."""
    optimizer = inner(thing)
    groups = getattr(optimizer, "__dict__", {}).get("param_groups", [])
    thing.load_state_dict(saved)
    for group, loaded in zip(groups, getattr(optimizer, "param_groups", ())):
        group.update(loaded)
    if groups:
        optimizer.param_groups = groups


def places_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What other tools' checkpoints have for the loop's locals."""
    if "files" in state:
        return {}
    names = ("global_step", "step", "epoch", "step_in_epoch")
    return {n: state["global_step" if n == "step" else n] for n in names}


def check_counts(path: Path, saved: Mapping[str, int], watched: Watched) -> None:
    wrong = [
        f"{n} of kind {kind}, watch() was given {len(watched[kind])}"
        for kind, n in saved.items()
        if n != len(watched[kind])
    ]
    if wrong:
        raise CheckpointError(f"{path} has {'; '.join(wrong)}; watch the same before resume()")


def check_names(own: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    there, here = (
        {name: tuple(getattr(value, "shape", ())) for name, value in tree.items()}
        for tree in (saved, own)
    )
    wrong = {
        "missing": here.keys() - there.keys(),
        "unexpected": there.keys() - here.keys(),
        "mis-shaped (saved, here)": {
            f"{n} {there[n]}, {here[n]}" for n in there.keys() & here if there[n] != here[n]
        },
    }
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"{path} is of a different model; {'; '.join(found)}")


def load_file(path: Path, name: str, *, mmap: bool = False) -> Any:
    """One file of a checkpoint. Data only: a pickle that would run code is refused.

    Models and optimizers come on the CPU; what the loop carried, on the device that it was on.
    """
    torch, where = torch_module(), None if name == "rng_state.pt" else "cpu"
    try:
        with torch.serialization.safe_globals(numpy_types()):
            return torch.load(path / name, map_location=where, weights_only=True, mmap=mmap)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling raises whatever the bytes make it raise
        raise CheckpointError(f"cannot load {path / name}: {error}") from error


def numpy_types() -> list[Any]:
    """What pickled numbers and arrays of numpy are made of: a learning rate is often one."""
    if (numpy := sys.modules.get("numpy")) is None:
        return []
    makers = [numpy.float64(0).__reduce__()[0], numpy.zeros(0).__reduce__()[0]]
    kinds = {type(numpy.dtype(code)) for code in "?bhilqBHILQefdgFD"}
    return [*makers, *kinds, numpy.dtype, numpy.ndarray]


def rng_state(generators: Sequence[Any]) -> dict[str, Any]:
    """Every generator a loop draws from, in types that `weights_only` loads. Draws nothing."""
    state = {name: generator_state(each) for name, each in global_generators().items()}
    torch = torch_module()
    if torch.cuda.is_initialized():  # the host's record of seed and offset: no wait for the device
        state["cuda"] = torch.cuda.get_rng_state()
    return {**state, "own": [generator_state(each) for each in generators]}


def set_rng_state(state: Mapping[str, Any], generators: Sequence[Any]) -> None:
    for name, generator in global_generators().items():
        if name in state:
            set_generator_state(generator, state[name])
    if "cuda" in state and torch_module().cuda.is_available():
        torch_module().cuda.set_rng_state(state["cuda"])
    for generator, own in zip(generators, state.get("own", ())):
        set_generator_state(generator, own)


def global_generators() -> dict[str, Any]:
    found = {"python": random, "torch": torch_module().default_generator}
    return found | ({"numpy": numpy.random} if (numpy := sys.modules.get("numpy")) else {})


def generator_state(generator: Any) -> Any:
    """Of torch's a tensor; of numpy's and Python's a text, whose thousand numbers are one value."""
    if hasattr(generator, "getstate"):
        return json.dumps(generator.getstate())
    if not hasattr(generator, "get_state"):
        return json.dumps(generator.bit_generator.state, default=lambda array: array.tolist())
    state = generator.get_state()
    if hasattr(state, "untyped_storage"):
        return state
    return json.dumps(state, default=lambda array: array.tolist())


def set_generator_state(generator: Any, state: Any) -> None:
    state = json.loads(state) if isinstance(state, str) else state
    if hasattr(generator, "getstate"):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif hasattr(generator, "get_state"):
        generator.set_state(tuple(state) if isinstance(state, list) else state)
    else:
        generator.bit_generator.state = state


def scaler_state(scaler: Any) -> dict[str, Any]:
    """GradScaler.state_dict() without its two `.item()`, each of which waits for the device."""
    scale, tracker = getattr(scaler, "_scale", None), getattr(scaler, "_growth_tracker", None)
    if scale is None or tracker is None or not scale.is_cuda:
        return dict(scaler.state_dict())
    return {
        "scale": scale,
        "_growth_tracker": tracker,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
    }


def unwrapped(thing: Any) -> Any:
    """The module within torch.compile's and DDP's wrappers: names without their prefixes."""
    wrappers = {
        "OptimizedModule": "_orig_mod",
        "DistributedDataParallel": "module",
        "DataParallel": "module",
    }
    while name := wrappers.get(type(thing).__name__):
        thing = getattr(thing, name)
    return thing


# --- Checkpoints: saving behind the loop ----------------------------------------------------------


class Frozen:
    """A file as torch.save would write it, of a state as it was at one moment.

    In the loop its containers are copied, behind it they are pickled and their storages replaced
    by the arena's copies. Storages, not tensors: so tied weights stay tied, and every view, stride
    and 0-d number comes back as it was.
    """

    def __init__(self, tree: Any, live: list[Any] | None = None) -> None:
        """Tensors of the usual kind join `live`; without it, as others, they are copied now."""
        self._torch = torch_module()
        self._usual = (self._torch.Tensor, self._torch.nn.Parameter)
        self._live, self._arena = live, Arena()
        self._keys: dict[int, str] = {}
        self._storages: dict[str, Any] = {}
        self._pickle, self.size = io.BytesIO(), 0
        self._tree = self._still(tree)

    def _still(self, tree: Any) -> Any:
        kind = type(tree)
        if kind in self._usual and self._live is not None and tree.layout is self._torch.strided:
            self._live.append(tree)
            return tree
        if isinstance(tree, self._torch.Tensor):
            is_trained = tree.requires_grad and tree.is_leaf
            return copy.deepcopy(tree) if is_trained else tree.detach().clone()
        if kind is dict:
            return {key: self._still(value) for key, value in tree.items()}
        if kind is list or kind is tuple:
            return kind([self._still(value) for value in tree])
        if kind in (int, float, str, bool, bytes, type(None)):
            return tree
        twin = copy.copy(tree) if isinstance(tree, dict) else copy.deepcopy(tree)
        if isinstance(tree, dict):  # keeps its kind, and the `_metadata` of a state_dict
            # A Counter's own `update` would count the pairs.
            dict.update(twin, [(key, self._still(value)) for key, value in tree.items()])
        return twin

    def pickle(self, arena: Arena) -> None:
        self._arena = arena
        TreePickler(self._pickle, self._reference).dump(self._tree)
        self.size = sum(storage.nbytes() for storage in self._storages.values())

    def write_to(self, path: Path) -> None:
        """By torch's own writer: what it writes to a file, not to us, it writes without the GIL."""
        writer = self._torch._C.PyTorchFileWriter(str(path))
        writer.write_record("data.pkl", self._pickle.getvalue(), self._pickle.tell())
        writer.write_record("byteorder", sys.byteorder, len(sys.byteorder))
        for key, storage in self._storages.items():
            writer.write_record(f"data/{key}", storage, storage.nbytes())
        writer.write_end_of_file()

    def _reference(self, value: Any) -> Any:
        """What torch.load knows a storage by; what the loop carries keeps its device."""
        if not isinstance(value, self._torch.storage.TypedStorage):
            return None
        if len(self._storages) % 32 == 31:  # to pickle is to hold the GIL, and the loop wants it
            time.sleep(0.0001)
        storage, kind = value._untyped_storage, getattr(self._torch, value._pickle_storage_type())
        # Counted, not by address: so the same state is the same bytes in each process.
        key, where = self._keys.setdefault(storage._cdata, str(len(self._keys))), "cpu"
        if self._live is None:
            where = self._torch.serialization.location_tag(storage)
            storage = storage.cpu()
        self._storages[key] = self._arena.copied(storage)
        return ("storage", kind, key, where, value._size())


class TreePickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, reference: Callable[[Any], Any]) -> None:
        super().__init__(file, protocol=2)
        self._reference = reference

    def persistent_id(self, value: Any) -> Any:
        return self._reference(value)


class Saver:
    """Takes a snapshot in the loop and writes it behind the loop's back, one at a time.

    Nothing here raises into the loop: a failed save is said, and older ones stay.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.skipped = self.failed = 0  # skipped: came while another one was being written
        self.write_s = 0.0  # processor time of the latest write
        self._arena = Arena()
        self._thread: threading.Thread | None = None
        self._last_step: int | None = None
        self._checked = False

    def prepare(self, parts: Mapping[str, Any], *jobs: Callable[[], Any]) -> None:
        """Reserve the memory for this state in the background: up to seconds for 4 GB on a GPU."""
        live: list[Any] = []
        freeze(parts, live)

        def reserve_memory() -> None:
            self._arena.lay_out(live)
            for job in jobs:
                job()

        self._start(reserve_memory, "no memory could be reserved for checkpoints")

    def save(
        self,
        step: int,
        parts: Callable[[], Mapping[str, Any]],
        state: Callable[[], dict[str, Any]],
        saved: Callable[[Path], Any] = lambda path: None,
        *,
        wait: float = 0,
    ) -> bool:
        """Snapshot what `parts` gives now, and write it behind.

        `wait` is for how many seconds it may wait for a save in flight, and then for its own; it is
        skipped while one is in flight. False while this or another one is not durable yet.
        """
        complaint = f"step {step} was not saved"
        if not self.wait(wait):
            self.skipped += 1
            return False
        if step == self._last_step or self.store.path(step) in self.store.keep:
            return True
        arena = self._arena
        live: list[Any] = []
        try:
            files = freeze(parts(), live)
            arena.copy(live)
        except Exception as error:  # a stranger's state, or no memory: the training goes on
            self._arena = Arena()
            self._fail(complaint, error)
            return True
        self._last_step = step

        def write() -> None:
            arena.arrive()
            for file in files.values():
                if isinstance(file, Frozen):
                    file.pickle(arena)
            saved(self.store.commit(step, files, state, self._check))

        self._start(write, complaint, hurry=wait > 0)
        return self.wait(wait) if wait else True

    def _check(self, staging: Path) -> None:
        """What a resume would refuse must not pass for saved; models and optimizers are tried once,
        what the loop carries may become of another kind at any time."""
        for path in staging.glob("*.pt*"):
            if path.name == "rng_state.pt" or not self._checked:
                load_file(staging, path.name, mmap=True)
        self._checked = True

    def wait(self, timeout: float | None = None) -> bool:
        """Until what is in flight is durable or has failed; False when the time ran out."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _start(self, job: Callable[[], Any], complaint: str, *, hurry: bool = False) -> None:
        def run(*, hurry: bool = hurry) -> None:
            if not hurry and sys.platform == "linux":  # where niceness is a thread's own
                with contextlib.suppress(OSError):  # the writer takes what time the loop leaves
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            began = time.thread_time()
            try:
                job()
                self.write_s = time.thread_time() - began
            except Exception as error:  # disk, memory, a stranger's state: never the training's
                self._fail(complaint, error)

        # A daemon: a disk that hangs must not hold up the end of the script; `wait` is for that.
        thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # no thread is to be had: in the loop, then
            run(hurry=True)

    def _fail(self, complaint: str, error: Exception) -> None:
        self.failed += 1
        self._last_step = None
        say(
            f"{complaint}: {error}; earlier checkpoints in {self.store.directory} are untouched, "
            "the training goes on"
        )


def freeze(parts: Mapping[str, Any], live: list[Any]) -> dict[str, Any]:
    """Generators and what the loop carries are few and new at each save: they are copied now."""
    return {
        name: Frozen(part, None if name == "rng_state.pt" else live)
        if isinstance(part, Mapping)
        else part
        for name, part in parts.items()
    }


class Arena:
    """Host memory, and on a CUDA device as much, with a place for each storage of a state.

    A CUDA state is first copied within its device (a millisecond for gigabytes) and leaves it
    beside the next steps in pieces, each awaited before the next is begun: so what the loop itself
    reads from the device waits for one piece at most. Where the device has no room it is copied
    to the host in the order of the loop's own stream, which then waits for all of it.
    """

    def __init__(self) -> None:
        self._addresses: list[int] = []  # of the tensors that it is laid out for
        self._storages: dict[int, Any] = {}  # kept alive, so that an address stays theirs
        self._places: dict[int, int] = {}  # in the block, by a storage's address
        self._block: Any = None  # of host memory
        self._pieces: list[tuple[int, int, int]] = []  # for memcpy
        self._devices: list[DeviceCopy] = []

    def lay_out(self, tensors: Sequence[Any]) -> None:
        """A place for each storage; where the tensors are those of the last time, all stays."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses == self._addresses:
            return
        self._addresses, self._devices, self._block = [], [], None  # never two of them at once
        storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
        order = sorted(storages, key=lambda address: str(storages[address].device))
        sizes = [-(-storages[address].nbytes() // 64) * 64 for address in order]
        self._storages = storages
        self._places = dict(zip(order, itertools.accumulate(sizes, initial=0)))
        on_host = [a for a in order if storages[a].device.type == "cpu"]
        self._block = resident_memory(sum(sizes), pinned=len(on_host) < len(order))
        base = address_of(self._block)
        self._pieces = [
            (base + self._places[a] + at, a + at, min(_CHUNK, storages[a].nbytes() - at))
            for a in on_host
            for at in range(0, storages[a].nbytes(), _CHUNK)
        ]
        for device in {storages[a].device for a in order} - {storages[a].device for a in on_host}:
            group = {self._places[a]: storages[a] for a in order if storages[a].device == device}
            self._devices.append(DeviceCopy(device, group, self._bytes()))
        self._addresses = addresses

    def copy(self, tensors: Sequence[Any]) -> None:
        """The state as it is now, in the order of the loop's streams. Never waits for one."""
        self.lay_out(tensors)
        copy_memory(self._pieces, torch_module().get_num_threads())
        for device in self._devices:
            device.copy()

    def arrive(self) -> None:
        """Wait until all is in host memory."""
        for device in self._devices:
            device.leave()

    def copied(self, storage: Any) -> Any:
        """Its copy; a storage that has no place is one already."""
        at = self._places.get(storage.data_ptr())
        return storage if at is None else self._bytes(at, storage.nbytes()).untyped_storage()

    def size(self) -> int:
        return 0 if self._block is None else len(self._block)

    def _bytes(self, at: int = 0, count: int = -1) -> Any:
        torch = torch_module()
        return torch.frombuffer(self._block, dtype=torch.uint8, offset=at, count=count)


class DeviceCopy:
    """The state of one CUDA device, and its way to the host."""

    PIECE_S = 0.0015  # that the loop may have to wait for

    def __init__(self, device: Any, group: Mapping[int, Any], host: Any) -> None:
        """`group` has the storages by their places in `host`."""
        torch = torch_module()
        first, last = min(group), max(group)
        self._host = host[first : last + group[last].nbytes()]
        self._stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event(blocking=True)
        self._staging = self._host
        free, total = torch.cuda.mem_get_info(device)
        if free - len(self._host) > total // 10:  # which must do for the largest step to come
            self._staging = torch.empty(len(self._host), dtype=torch.uint8, device=device)
        else:
            warn_once(
                f"{device} has no room for a second copy of the state: each save holds it for as "
                "long as the state takes to leave it"
            )
        # One call for each size of word. As integers: no bit of a NaN changes on the way.
        self._words: dict[Any, tuple[list[Any], list[Any]]] = {}
        for place, storage in group.items():
            count, address = storage.nbytes(), storage.data_ptr()
            word = torch.uint8 if count % 8 or address % 8 else torch.int64
            of = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
            to_all, of_all = self._words.setdefault(word, ([], []))
            to_all.append(self._staging[place - first : place - first + count].view(word))
            of_all.append(of.view(word))

    def copy(self) -> None:
        torch = torch_module()
        for to_all, of_all in self._words.values():
            torch._foreach_copy_(to_all, of_all, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self._stream.device))

    def leave(self) -> None:
        """In the writer's thread; each wait lets go of the GIL."""
        torch = torch_module()
        self._copied.synchronize()
        if self._staging is self._host:
            return
        size, at, done = 16 << 20, 0, torch.cuda.Event(blocking=True)
        while at < len(self._host):
            began, end = time.perf_counter(), at + size
            with torch.cuda.stream(self._stream):
                self._host[at:end].copy_(self._staging[at:end], non_blocking=True)
                done.record(self._stream)
            done.synchronize()
            rate = size / (time.perf_counter() - began)
            at, size = end, max(4 << 20, min(128 << 20, int(rate * self.PIECE_S) & -4096))


def resident_memory(size: int, pinned: bool) -> mmap.mmap:
    """Bytes that are already resident, so that the first save takes no page faults."""
    block = mmap.mmap(-1, max(size, 4096), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # DONTFORK: a data loader's worker would make every page of it copy-on-write.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(OSError, AttributeError):
            block.madvise(getattr(mmap, advice))
    address = address_of(block)
    ctypes.memset(address, 0, len(block))  # lets go of the GIL
    if pinned:  # in place: `pin_memory` would round the size up to a power of two
        cuda = torch_module().cuda.cudart()
        # Where the limit on locked memory refuses, the copies still work, only slower.
        if int(cuda.cudaHostRegister(address, len(block), 1)) == 0:
            weakref.finalize(block, cuda.cudaHostUnregister, address).atexit = False
    return block


def address_of(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def copy_memory(pieces: Sequence[tuple[int, int, int]], workers: int) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
