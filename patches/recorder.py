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
import re
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lines import marked_in

__all__ = ["COMPARED", "COUNTED", "Entry", "Job", "record", "seen", "shortened"]

COMPARED = ("loss", "value", "step", "end")  # in their order; a line stands between two of them
# By which a kill finds its moment: of others clocks may decide how many.
COUNTED = (*COMPARED, "at")


@dataclass(frozen=True)
class Job:
    """One run to record."""

    script: str
    folder: str  # to start in
    args: Sequence[str]
    record: str  # the file that is written, an entry a line; beside it what the script prints
    seed: int
    steps: int | None = None
    nproc: int = 1
    save_interval: int = 0  # the drop-in's; with one its steps, saves and evaluations are noted
    kill_after: int | None = None  # entries, with those before the checkpoint that is resumed
    settled: bool = False  # a checkpoint is waited for before the next step, and before the kill


class Entry(NamedTuple):
    """Something that a run did."""

    kind: str  # loss, value, step, end; line, aside, open; begin, done; at, save, eval, resume
    step: int  # optimizer steps so far, of a loss with the one under way
    bits: str
    value: float | None = None
    place: str = ""

    @property
    def where(self) -> str:
        """What is compared of its place: a value's has moved with the added lines."""
        return "" if self.kind == "value" else self.place

    def same(self, other: Entry) -> bool:
        return self[:3] == other[:3] and self.where == other.where

    def __str__(self) -> str:
        value = "" if self.value is None else str(self.value)
        return " ".join(filter(None, (self.kind, self.where, value, self.bits)))


class Enough(BaseException):
    """The optimizer steps that were asked for are made; no handler of the script's is meant."""


def record(job: Job) -> int:
    """Run the script in this process as Python would, noting what it does."""
    recorder = Recorder(job)
    sys.argv, sys.path[0] = [job.script, *job.args], os.path.dirname(job.script)
    sys.modules.pop("lines", None)  # the script may have a module of this name
    watch(recorder)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=job.script, __builtins__=__builtins__)
    recorder.main, sys.modules["__main__"] = sys.modules["__main__"], main
    atexit.register(recorder.done)  # registered first, it is called last
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
        self.write(Entry("begin", 0, str(self.pid)))

    @property
    def is_passing(self) -> bool:
        """On the way back to a checkpoint: what is done there was done before."""
        return self.marks is not None and self.marks.run.is_passing()

    def note(self, kind: str, bits: str = "", value: float | None = None, place: str = "") -> None:
        self.add(Entry(kind, self.steps + (kind == "loss"), bits, value, place))

    def add(self, entry: Entry) -> None:
        if os.getpid() != self.pid or self.is_passing:  # a forked worker
            return
        if self.marks is not None:
            self.marks.flush()
        self.write(entry)
        self.lines = 0 if entry.kind in COMPARED else self.lines + (entry.kind == "line")
        self.noted += entry.kind in COUNTED
        if entry.kind in COUNTED and self.noted == self.job.kill_after:
            self.kill()

    def write(self, entry: Entry) -> None:
        if os.getpid() == self.pid:
            os.write(self.file, (json.dumps(entry) + "\n").encode())

    def kill(self) -> None:
        """With the other ranks, which would be stopped gently."""
        if self.job.settled and self.marks is not None:
            self.marks.run.settle()
        self.write(Entry("killed", self.steps, ""))
        for other in range(1, self.job.nproc):
            first = Path(f"{self.job.record}.{other}").read_text().splitlines()[0]
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(Entry(*json.loads(first)).bits), signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)

    def after_step(self, *_: Any) -> None:
        if os.getpid() != self.pid:
            return
        self.steps += 1
        self.note("step")
        if self.steps == self.job.steps:
            self.end()
            raise Enough

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

    def saved(self, obj: Any, f: Any, *_: Any, **__: Any) -> None:
        """By torch.save, which opens its file by itself."""
        if isinstance(f, str | os.PathLike):
            self.write(Entry("open", self.steps, "whole", None, os.path.abspath(f)))

    def done(self) -> None:
        for stream in self.streams:
            stream.hear("\n")  # a line that was begun is seen, too
        self.note("done")


# --- What is noted --------------------------------------------------------------------------------


def watch(recorder: Recorder) -> None:
    """Have torch, the drop-in and Python tell the recorder what the script does."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch: Any = recorder.torch

    def keep_module(owner: Any, *_: Any) -> None:
        recorder.modules[id(owner)] = owner

    base, module = torch.optim.Optimizer, torch.nn.modules.module
    torch.autograd.backward = propagating(recorder, torch.autograd.backward)
    torch.autograd.grad = propagating(recorder, torch.autograd.grad)
    torch.Tensor.item = reading(recorder, torch.Tensor.item)
    torch.Tensor.__float__ = reading(recorder, torch.Tensor.__float__)
    base.__init__ = and_then(
        base.__init__, lambda owner, *_, **__: recorder.optimizers.append(owner)
    )
    register_optimizer_step_post_hook(recorder.after_step)
    module.register_module_parameter_registration_hook(keep_module)
    module.register_module_buffer_registration_hook(keep_module)
    torch.save = and_then(torch.save, recorder.saved)
    if torch.distributed.is_available():
        group = torch.distributed.init_process_group
        grouped = and_then(group, lambda *_, **__: recorder.note("group"))
        torch.distributed.init_process_group = grouped
    if recorder.job.save_interval:
        import observability

        run: Any = observability.Run
        run.__init__ = and_then(run.__init__, lambda owner, *_, **__: Marks(recorder, owner))
    sys.addaudithook(opening(recorder))


def and_then(call: Any, after: Callable[..., object]) -> Any:
    @functools.wraps(call)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        after(*args, **kwargs)
        return result

    return both


def propagating(recorder: Recorder, call: Any) -> Any:
    @functools.wraps(call)
    def noted(*args: Any, **kwargs: Any) -> Any:
        given: Any = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
        for loss in [given] if hasattr(given, "detach") else given:
            bits = bits_of(loss)
            single = loss.numel() == 1 and loss.is_floating_point() and UNREADABLE not in bits
            if bits != WITHOUT_VALUES:  # on the meta device, to count its operations
                value = loss.detach().reshape(-1).tolist()[0] if single else None
                recorder.note("loss", bits, value)
        return call(*args, **kwargs)

    return noted


def reading(recorder: Recorder, call: Any) -> Any:
    library = os.path.dirname(str(recorder.torch.__file__)) + os.sep

    @functools.wraps(call)
    def read(tensor: Any) -> Any:
        """Not what torch or the drop-in reads for itself, nor an added line."""
        value, frame = call(tensor), sys._getframe(1)
        while frame.f_code.co_filename == f"{library}_tensor.py":  # on behalf of its caller
            frame = frame.f_back or sys._getframe(1)
        file, line = frame.f_code.co_filename, frame.f_lineno
        ours = os.path.basename(file) == "observability.py" or file.startswith(library)
        if isinstance(value, float) and not ours and line not in marked_in(file):
            recorder.note("value", value.hex(), value, f"{os.path.basename(file)}:{line}")
        return value

    return read


def opening(recorder: Recorder) -> Callable[[str, Any], None]:
    """Note a file that is to be written: as a whole from here on, or a part of it."""

    def heard(event: str, facts: Any) -> None:
        if event == "open" and isinstance(facts[0], str) and facts[2] & (os.O_WRONLY | os.O_RDWR):
            whole = facts[2] & (os.O_TRUNC | os.O_EXCL) and not recorder.is_passing
            path, how = os.path.abspath(facts[0]), "whole" if whole else "part"
            recorder.write(Entry("open", recorder.steps, how, None, path))

    return heard


BAR = re.compile(r"%\|.*\||\[\d+:[\d:]+(?:<[\d:?]+)?, |\x1b\[\d*[A-HJK]")  # tqdm's, or moves


def seen(line: str) -> str:
    """What stands there in the end; '' of a progress bar, and of what the drop-in says."""
    text = line.rstrip("\r").rpartition("\r")[2].partition("observability: ")[0]
    return "" if not text.strip() or BAR.search(text) else text


ONCE = re.compile(r"_?(?:rank_zero_)?(?:warn|warning|info|debug|error|log)_once")


def comes_once(frame: types.FrameType | None) -> bool:
    """In a process: by a warning, or logging's of that kind. A resumed process says it again."""
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module in ("warnings", "_py_warnings") or ONCE.fullmatch(frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False


class Stream:
    """Notes the lines that the script's main thread prints; others come in no order."""

    def __init__(self, recorder: Recorder, stream: Any) -> None:
        self.recorder, self.thread = recorder, threading.get_ident()
        self.begun = {"line": "", "aside": ""}
        stream.reconfigure(line_buffering=True)  # whole lines between those of other processes
        self.print, stream.write = stream.write, self.write

    def write(self, text: str) -> Any:
        by = str(sys._getframe(1).f_globals.get("__name__"))
        is_aside = threading.get_ident() != self.thread or comes_once(sys._getframe(1))
        if by.rpartition(".")[2] != "observability":  # whose line may come in the middle of one
            self.hear(text, "aside" if is_aside else "line")  # first, as the kill may be due
        return self.print(text)

    def hear(self, text: str, kind: str = "line") -> None:
        *lines, begun = f"{self.begun[kind]}{text}".split("\n")
        # A line is drawn anew; the last sign may yet be the first half of an end of a line.
        begun = begun[begun.rfind("\r", 0, -1) + 1 :]
        self.begun[kind] = "" if BAR.search(begun) else begun
        for line in filter(None, map(seen, lines)):
            if kind == "aside" or self.recorder.is_passing:
                self.recorder.write(Entry("aside", self.recorder.steps, line))
            else:
                self.recorder.note("line", line)


class Marks:
    """Notes the steps of the drop-in's run, by which a resumed one finds its place; a listener."""

    def __init__(self, recorder: Recorder, run: Any) -> None:
        self.recorder, self.run = recorder, run
        self.made: list[Entry] = []  # a step that is not over
        recorder.marks = self
        run.add_listener(self)

    def stepped(self, step: int, metrics: Mapping[str, Any]) -> None:
        """It has yet to be saved: it is noted when its step() is over, before what comes next."""
        self.flush()
        self.made.append(Entry("at", step, str(step), None, str(self.run.epoch)))

    def flush(self) -> None:
        if self.made:
            if self.recorder.job.settled:
                self.run.settle()
            self.recorder.add(self.made.pop())

    def evaluating(self) -> None:
        self.recorder.note("eval", str(self.recorder.noted))

    def finishing(self, status: str) -> None:
        self.flush()

    def saving(self, step: int) -> list[Any]:
        """Its place: a save may come with a step, or behind all that follows it in its epoch."""
        recorder = self.recorder
        recorder.write(Entry("save", recorder.steps, str(recorder.noted + 1)))
        begun = [stream.begun for stream in recorder.streams]
        return [recorder.steps, recorder.noted + len(self.made), recorder.lines, begun]

    def resumed(self, kept: Sequence[Any]) -> None:
        self.recorder.steps, noted, lines, begun = kept
        self.recorder.write(Entry("resume", self.recorder.steps, str(noted), lines))
        self.recorder.noted, self.recorder.lines = noted, lines
        for stream, each in zip(self.recorder.streams, begun, strict=True):
            stream.begun = each


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


UNREADABLE, WITHOUT_VALUES = "unreadable", "without values"
EMPTY = {"UninitializedParameter", "UninitializedBuffer", "FakeTensor"}  # of shapes alone


def bits_of(tensor: Any) -> str:
    """Its exact bits, of more than a few their digest."""
    if tensor.is_meta or type(tensor).__name__ in EMPTY:
        return WITHOUT_VALUES
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
