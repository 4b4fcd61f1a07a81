"""Run a script as Python would, and note what it does: the process that prove.py starts.

    python recorder.py JOB.json

It seeds the generators before the script does, and writes an entry for each loss that is
back-propagated, each float read off a tensor, each optimizer step, each line that is printed, and
each part of the end.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lines import marked_in

__all__ = ["COMPARED", "Entry", "Job", "record"]

COMPARED = ("loss", "value", "step", "end")  # in their order; a line stands between two of them
ASIDE = (
    "begin",
    "line",
    "open",
    "save",
    "eval",
    "killed",
)  # entries that do not count: clocks may decide how many


@dataclass(frozen=True)
class Job:
    """One run to record."""

    script: str
    root: str
    args: Sequence[str]
    record: str  # the file that is written, an entry a line
    log: str  # what the script prints
    seed: int
    steps: int | None = None
    nproc: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    marks: bool = False  # note the drop-in's steps too, by which a resumed run finds its place,
    # its saves and evaluations, and which files are opened to be written
    kill_after: int | None = None  # entries, with those before the checkpoint that is resumed
    settled: bool = False  # a checkpoint is waited for before the next step, and before the kill


class Entry(NamedTuple):
    """Something that a run did."""

    kind: str  # loss, value, step, end; line, open; done; of the drop-in at, save, eval, resume
    step: int  # optimizer steps so far, of a loss with the one under way
    bits: str
    value: float | None = None
    place: str = ""
    times: Sequence[float] = ()  # seconds since the script's start: wall time and CPU

    @property
    def key(self) -> tuple[object, ...]:
        return (*self[:3], self.place if self.kind == "end" else "")

    def __str__(self) -> str:
        place = self.place if self.kind == "end" else ""
        value = "" if self.value is None else str(self.value)
        return " ".join(filter(None, (self.kind, place, value, self.bits)))


class Enough(BaseException):
    """The optimizer steps that were asked for are made; no handler of the script's is meant."""


def record(job: Job) -> int:
    """Run the script in this process as Python would, noting what it does."""
    recorder = Recorder(job)
    sys.argv, sys.path[0] = [job.script, *job.args], os.path.dirname(job.script)
    sys.modules.pop("lines", None)  # the script may have a module of this name
    recorder.watch()
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=job.script, __builtins__=__builtins__)
    recorder.main, sys.modules["__main__"] = sys.modules["__main__"], main
    atexit.register(recorder.note, "done")  # registered first, it is called last
    try:
        exec(compile(Path(job.script).read_bytes(), job.script, "exec"), main.__dict__)
    except Enough:
        return 0
    except SystemExit as error:
        if error.code:
            raise
    except BaseException as error:  # the script's: it ends as in a Python of its own
        sys.last_value = error  # as Python does: who looks at it at exit knows that this failed
        own = error.__traceback__
        traceback.print_exception(type(error), error, own and own.tb_next)
        return 1
    recorder.end()
    return 0


class Recorder:
    """Writes an entry a line, each by one call, so that a kill loses and tears nothing."""

    def __init__(self, job: Job) -> None:
        import torch

        self.job, self.pid, self.torch = job, os.getpid(), torch
        self.file = os.open(job.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.library = os.path.dirname(torch.__file__) + os.sep
        self.steps = self.noted = self.lines = 0  # lines since the last entry that is compared
        self.streams = [Stream(self, sys.stdout), Stream(self, sys.stderr)]
        self.marks: Marks | None = None  # of the drop-in's run, once it is open
        # Held to the end: what a function made is gone when it returns.
        self.optimizers: list[Any] = []
        self.modules: dict[int, Any] = {}
        self.main: Any = None  # this module itself, whose globals would go with it
        random.seed(job.seed)
        torch.manual_seed(job.seed)
        with contextlib.suppress(ImportError):
            import numpy

            numpy.random.seed(job.seed % 2**32)
        self.began = time.perf_counter(), time.process_time()
        self.write("begin", str(self.pid), None, "", 0)

    def note(
        self,
        kind: str,
        bits: str = "",
        value: float | None = None,
        place: str = "",
        *,
        step: int | None = None,
    ) -> None:
        if os.getpid() != self.pid:  # a forked worker
            return
        if self.marks is not None:
            if self.marks.run.is_passing():  # what is read on the way back was read before
                return
            self.marks.flush()
        self.write(kind, bits, value, place, self.steps if step is None else step)
        if kind in ASIDE:
            self.lines += kind == "line"
            return
        self.noted += 1
        self.lines = 0 if kind in COMPARED else self.lines
        if self.noted == self.job.kill_after:
            if self.job.settled and self.marks is not None:
                self.marks.run.settle()
            self.kill()

    def kill(self) -> None:
        """With the other ranks, which would be stopped gently."""
        self.write("killed", "", None, "", self.steps)
        for other in range(1, self.job.nproc):
            first = Path(f"{self.job.record}.{other}").read_text().splitlines()[0]
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(Entry(*json.loads(first)).bits), signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)

    def write(self, kind: str, bits: str, value: float | None, place: str, step: int) -> None:
        now = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        entry = Entry(kind, step, bits, value, place, now)
        os.write(self.file, (json.dumps(entry) + "\n").encode())

    def watch(self) -> None:
        from torch.nn.modules import module
        from torch.optim import optimizer

        autograd: Any = self.torch.autograd
        tensor: Any = self.torch.Tensor
        base: Any = optimizer.Optimizer
        autograd.backward = self.propagating(autograd.backward)
        autograd.grad = self.propagating(autograd.grad)
        tensor.item, tensor.__float__ = self.reading(tensor.item), self.reading(tensor.__float__)
        base.__init__ = self.and_then(base.__init__, lambda made: self.optimizers.append(made))
        optimizer.register_optimizer_step_post_hook(self.after_step)
        module.register_module_parameter_registration_hook(self.keep_module)
        module.register_module_buffer_registration_hook(self.keep_module)
        if self.job.marks:
            import observability

            run: Any = observability.Run
            run.__init__ = self.and_then(run.__init__, self.mark)
            sys.addaudithook(self.opening)

    def and_then(self, call: Any, after: Callable[[Any], None]) -> Any:
        @functools.wraps(call)
        def both(owner: Any, *args: Any, **kwargs: Any) -> Any:
            result = call(owner, *args, **kwargs)
            after(owner)
            return result

        return both

    def propagating(self, call: Any) -> Any:
        @functools.wraps(call)
        def noted(*args: Any, **kwargs: Any) -> Any:
            given: Any = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
            for loss in [given] if hasattr(given, "detach") else given:
                single = hasattr(loss, "numel") and loss.numel() == 1 and loss.is_floating_point()
                value = loss.detach().reshape(-1).tolist()[0] if single else None
                self.note("loss", bits_of(loss), value, step=self.steps + 1)
            return call(*args, **kwargs)

        return noted

    def reading(self, call: Any) -> Any:
        @functools.wraps(call)
        def read(tensor: Any) -> Any:
            value = call(tensor)
            if isinstance(value, float):
                self.note_value(value, sys._getframe(1))
            return value

        return read

    def note_value(self, value: float, frame: Any) -> None:
        """Not what torch or the drop-in reads for itself, nor an added line."""
        while frame.f_code.co_filename == f"{self.library}_tensor.py":  # on behalf of its caller
            frame = frame.f_back
        file, line = frame.f_code.co_filename, frame.f_lineno
        name = os.path.basename(file)
        if name == "observability.py" or file.startswith(self.library):
            return
        if line not in marked_in(file):
            self.note("value", value.hex(), value, f"{name}:{line}")

    def keep_module(self, module: Any, name: str, tensor: Any) -> None:
        self.modules[id(module)] = module

    def after_step(self, optimizer: Any, *_: Any) -> None:
        if os.getpid() != self.pid:
            return
        self.steps += 1
        self.note("step")
        if self.steps == self.job.steps:
            self.end()
            raise Enough

    def opening(self, event: str, facts: Any) -> None:
        """Note a file that is to be written: as a whole from here on, or a part of it."""
        if event != "open" or os.getpid() != self.pid or not isinstance(facts[0], str):
            return
        if facts[2] & (os.O_WRONLY | os.O_RDWR):
            passing = self.marks is not None and self.marks.run.is_passing()
            whole = facts[2] & (os.O_TRUNC | os.O_EXCL) and not passing
            path = os.path.abspath(facts[0])
            self.write("open", "whole" if whole else "part", None, path, self.steps)

    def mark(self, run: Any) -> None:
        self.marks = Marks(self, run)
        run.add_listener(self.marks)

    def end(self) -> None:
        """All that the run has come to."""
        trees: dict[str, Any] = {}
        for index, module in enumerate(self.modules.values()):
            trees[f"{type(module).__name__} {index}"] = {**module._parameters, **module._buffers}
        for index, each in enumerate(self.optimizers):
            parameters = [group["params"] for group in each.param_groups]
            trees[f"{type(each).__name__} {index}"] = {"of": parameters, **each.state_dict()}
        trees["random"] = {"python": str(random.getstate()), "torch": self.torch.get_rng_state()}
        if "numpy" in sys.modules:
            trees["random numpy"] = sys.modules["numpy"].random.get_state()
        if self.torch.cuda.is_available():
            trees["random cuda"] = self.torch.cuda.get_rng_state_all()
        for path, bits in leaves(trees):
            self.note("end", bits, place=path)


class Stream:
    """Notes the lines that the script's main thread prints: others come in no order."""

    def __init__(self, recorder: Recorder, stream: Any) -> None:
        self.recorder, self.thread = recorder, threading.get_ident()
        self.begun = ""  # of a line
        self.print, stream.write = stream.write, self.write

    def write(self, text: str) -> Any:
        written = self.print(text)
        # A process shows a warning once: a resumed one again.
        by = sys._getframe(1).f_globals.get("__name__")
        if threading.get_ident() == self.thread and by not in ("warnings", "_py_warnings"):
            self.hear(text.replace("\r\n", "\n"))
        return written

    def hear(self, text: str) -> None:
        if "\r" in text or "\x1b[A" in text:  # a line is drawn anew, as a progress bar is
            self.begun = ""
            return
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            if line.strip() and not line.startswith("observability: "):
                self.recorder.note("line", line)


class Marks:
    """Notes the steps of the drop-in's run, by which a resumed one finds its place; a listener."""

    def __init__(self, recorder: Recorder, run: Any) -> None:
        self.recorder, self.run = recorder, run
        self.made: tuple[int, int, str] | None = (
            None  # a step to be noted, optimizers' steps, epoch
        )

    def stepped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """It has yet to be saved: it is noted when its step() is over, before what comes next."""
        self.flush()
        self.made = step, self.recorder.steps, str(self.run.epoch)

    def flush(self) -> None:
        made, self.made = self.made, None
        if made is not None:
            if self.recorder.job.settled:
                self.run.settle()
            self.recorder.note("at", str(made[0]), step=made[1], place=made[2])

    def evaluating(self) -> None:
        self.recorder.note("eval", str(self.recorder.noted))

    def finishing(self, status: str) -> None:
        self.flush()

    def saving(self, step: int) -> list[Any]:
        """Its place: a save may come with a step, or behind all that follows it in its epoch."""
        noted = self.recorder.noted
        self.recorder.write("save", str(noted + 1), None, "", self.recorder.steps)
        begun = [stream.begun for stream in self.recorder.streams]
        steps, lines = self.recorder.steps, self.recorder.lines
        return [steps, noted + (self.made is not None), lines, *begun]

    def resumed(self, kept: Sequence[Any]) -> None:
        self.recorder.steps, noted, lines, *begun = kept
        self.recorder.note("resume", str(noted), lines)
        self.recorder.noted, self.recorder.lines = noted, lines
        for stream, text in zip(self.recorder.streams, begun, strict=True):
            stream.begun = text


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Tensors, numbers and strings by their path; a function has an address and no value."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, item in items:
            yield from leaves(item, f"{path}.{name}" if path else str(name))
    elif hasattr(tree, "untyped_storage"):
        yield path, bits_of(tree)
    elif isinstance(tree, str | int | float):
        yield path, tree.hex() if isinstance(tree, float) else shortened(str(tree).encode())
    elif hasattr(tree, "tobytes"):
        yield path, shortened(tree.tobytes())


UNREADABLE = "unreadable"
EMPTY = {"UninitializedParameter", "UninitializedBuffer", "FakeTensor"}  # of shapes alone


def bits_of(tensor: Any) -> str:
    """Its exact bits, of more than a few their digest."""
    if tensor.is_meta or type(tensor).__name__ in EMPTY:
        return "without values"
    try:
        dense = tensor if str(tensor.layout) == "torch.strided" else tensor.to_dense()
        flat = dense.detach().cpu().resolve_conj().resolve_neg().contiguous()
        data = ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size())
    except RuntimeError as error:  # torch's, of a tensor without memory: prove.py refuses
        return f"{UNREADABLE}: {error}"
    return f"{str(flat.dtype).removeprefix('torch.')}:{shortened(data)}"


def shortened(data: bytes) -> str:
    return data.hex() if len(data) <= 8 else hashlib.sha256(data).hexdigest()[:32]


if __name__ == "__main__":
    if sys.platform == "linux":  # SIGKILL comes with the prover's end: PR_SET_PDEATHSIG is 1
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    if rank := int(os.environ["RANK"]) if job.nproc > 1 else 0:
        job = replace(job, record=f"{job.record}.{rank}", kill_after=None)
    sys.exit(record(job))
