"""What the bench compares: one small class for each way to record a training step.

All keep the contract of `Peer` and record the same four scalars a step: the loss, the learning
rate, tokens per second and the gradient norm. Each is set up as kindly as its options allow
(no system metrics, no console capture, nothing sent anywhere), so that a ratio is about the
call and not about extras. Whoever reads a folder after a crash reads it as that tool would.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sqlite3
import struct
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

LR, SPEED, NORM, TOKENS = 0.006, 412345.678, 1.25, 8192
NAMES = ("loss/train", "lr", "speed/tokens_per_sec_step", "grad_norm")
OURS = "ours"


class Peer(ABC):
    """One way to record four scalars a step."""

    name: ClassVar[str]
    module: ClassVar[str] = "json"  # what has to be importable
    package: ClassVar[str | None] = None  # what to ask for a version

    def prepare(self) -> None:  # noqa: B027 - few need it
        """Make what the script has anyway; never timed."""

    def load(self) -> None:  # noqa: B027 - most ways have nothing to import
        """Import what the tool needs; timed apart from `start`."""

    @abstractmethod
    def start(self, folder: Path) -> None:
        """Open a run that writes below `folder`."""

    @abstractmethod
    def step(self, step: int, loss: Any) -> None:
        """Record one step; `loss` is a float or a 0-d tensor."""

    @abstractmethod
    def close(self) -> None:
        """Return when everything recorded is on its way to disk."""

    @abstractmethod
    def count(self, folder: Path) -> Counter[int]:
        """How often each step can be read back whole from what lies in `folder`."""

    def version(self) -> str | None:
        return importlib.metadata.version(self.package) if self.package else None


# --- The floor and ours ---------------------------------------------------------------------


class Empty(Peer):
    """A call with the same arguments that does nothing: what calling costs."""

    name = "empty"

    def start(self, folder: Path) -> None:
        pass

    def step(self, step: int, loss: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def count(self, folder: Path) -> Counter[int]:
        return Counter()


class Ours(Peer):
    """`observability.step()`, with journal and TensorBoard events."""

    name = OURS
    module = "observability"

    def prepare(self) -> None:
        import torch

        self.model = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)

    def load(self) -> None:
        self.obs = importlib.import_module("observability")

    def start(self, folder: Path) -> None:
        self.obs.init("bench", out_dir=str(folder / "out"), tb_dir=str(folder / "tb"))
        self.obs.watch(self.model, optimizer=self.optimizer)
        self.optimizer.step()  # from here on its learning rate is known

    def step(self, step: int, loss: Any) -> None:
        self.obs.step(step, loss=loss, tokens=TOKENS, grad_norm=NORM)

    def close(self) -> None:
        self.obs.finish()

    def count(self, folder: Path) -> Counter[int]:
        self.load()
        records = self.obs.read_run(str(folder / "out" / "bench"))
        return Counter(r["step"] for r in records if r["metrics"].keys() >= set(NAMES))


# --- TensorBoard writers --------------------------------------------------------------------


class SummaryWriter(Peer):
    """torch.utils.tensorboard, four add_scalar calls."""

    name = "SummaryWriter"
    module = "tensorboard"
    package = "tensorboard"
    source: ClassVar[str] = "torch.utils.tensorboard"

    def load(self) -> None:
        self.writer_class = importlib.import_module(self.source).SummaryWriter

    def start(self, folder: Path) -> None:
        self.writer = self.writer_class(str(folder / "tb"))

    def step(self, step: int, loss: Any) -> None:
        writer = self.writer
        writer.add_scalar("loss/train", _number(loss), step)
        writer.add_scalar("lr", LR, step)
        writer.add_scalar("speed/tokens_per_sec_step", SPEED, step)
        writer.add_scalar("grad_norm", NORM, step)

    def close(self) -> None:
        self.writer.close()

    def count(self, folder: Path) -> Counter[int]:
        scalars: Counter[int] = Counter()
        for path in sorted(folder.glob("tb/**/*tfevents*")):
            scalars.update(_event_steps(path))
        return Counter({step: n // len(NAMES) for step, n in scalars.items()})


class TensorboardX(SummaryWriter):
    """tensorboardX, four add_scalar calls."""

    name = "tensorboardX"
    module = "tensorboardX"
    package = "tensorboardX"
    source = "tensorboardX"


def _event_steps(path: Path) -> Iterator[int]:
    """The step of every scalar that TensorBoard's own reader still finds."""
    loaders = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    protos = importlib.import_module("tensorboard.compat.proto.event_pb2")
    for raw in loaders.RawEventFileLoader(str(path)).Load():
        event = protos.Event.FromString(raw)
        yield from (event.step for value in event.summary.value if value.tag in NAMES)


# --- Experiment trackers --------------------------------------------------------------------


class Wandb(Peer):
    """Weights & Biases, offline."""

    name = "wandb"
    module = "wandb"
    package = "wandb"

    def load(self) -> None:
        self.wandb = importlib.import_module("wandb")

    def start(self, folder: Path) -> None:
        settings = self.wandb.Settings(console="off", x_disable_stats=True, silent=True)
        self.run = self.wandb.init(
            project="bench", name="bench", mode="offline", dir=str(folder), settings=settings
        )

    def step(self, step: int, loss: Any) -> None:
        values = (_number(loss), LR, SPEED, NORM)
        self.run.log(dict(zip(NAMES, values, strict=True)), step=step)

    def close(self) -> None:
        self.run.finish()

    def count(self, folder: Path) -> Counter[int]:
        from wandb.proto.wandb_internal_pb2 import Record

        steps: Counter[int] = Counter()
        for path in folder.glob("wandb/offline-run-*/*.wandb"):
            for raw in _leveldb_records(path.read_bytes()):
                record = Record.FromString(raw)
                if len(record.history.item) >= len(NAMES):
                    steps[record.history.step.num] += 1
        return steps


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: a LevelDB log behind 7 bytes of its own header."""
    block, header, first, last, full = 32768, 7, 2, 4, 1
    at, parts = header, b""
    while at + header <= len(data):
        if block - at % block < header:  # too little left for a header: padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        payload = data[at + header : at + header + length]
        if len(payload) < length or kind == 0:
            return  # torn tail
        parts = payload if kind in (full, first) else parts + payload
        if kind in (full, last):
            yield parts
        at += header + length


class Trackio(Peer):
    """trackio, local SQLite; its folder comes from TRACKIO_DIR, read when it is imported."""

    name = "trackio"
    module = "trackio"
    package = "trackio"

    def load(self) -> None:
        self.trackio = importlib.import_module("trackio")

    def start(self, folder: Path) -> None:
        self.run = self.trackio.init(
            project="bench", name="bench", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def step(self, step: int, loss: Any) -> None:
        values = (_number(loss), LR, SPEED, NORM)
        self.run.log(dict(zip(NAMES, values, strict=True)), step=step)

    def close(self) -> None:
        self.trackio.finish()

    def count(self, folder: Path) -> Counter[int]:
        steps: Counter[int] = Counter()
        for path in (folder / "trackio").glob("*.db"):
            with sqlite3.connect(path) as connection:
                steps.update(row[0] for row in connection.execute("SELECT step FROM metrics"))
        return steps


# --- Lines of JSON --------------------------------------------------------------------------


class JsonLine(Peer):
    """json.dumps, write and flush: what most people write by hand."""

    name = "json"

    def start(self, folder: Path) -> None:
        self.file = open(folder / "metrics.ndjson", "a")  # noqa: SIM115 - open as long as the run

    def step(self, step: int, loss: Any) -> None:
        values = (step, _number(loss), LR, SPEED, NORM)
        line = dict(zip(("step", *NAMES), values, strict=True))
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def count(self, folder: Path) -> Counter[int]:
        lines = (folder / "metrics.ndjson").read_bytes().split(b"\n")
        return Counter(json.loads(line)["step"] for line in lines[:-1])


class OrjsonLine(JsonLine):
    """orjson.dumps and one unbuffered os.write."""

    name = "orjson"
    module = "orjson"
    package = "orjson"

    def load(self) -> None:
        self.dumps = importlib.import_module("orjson").dumps

    def start(self, folder: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.descriptor = os.open(folder / "metrics.ndjson", flags, 0o644)

    def step(self, step: int, loss: Any) -> None:
        values = (step, _number(loss), LR, SPEED, NORM)
        line = dict(zip(("step", *NAMES), values, strict=True))
        os.write(self.descriptor, self.dumps(line) + b"\n")

    def close(self) -> None:
        os.close(self.descriptor)


# --- Which there are ------------------------------------------------------------------------


def _number(loss: Any) -> float:
    return loss if type(loss) is float else loss.item()


_ALL: tuple[type[Peer], ...] = (
    Empty,
    Ours,
    SummaryWriter,
    TensorboardX,
    Wandb,
    Trackio,
    JsonLine,
    OrjsonLine,
)
PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in _ALL}


def find_ours(folder: Path) -> None:
    """Make `observability.py` in `folder` the one that is imported."""
    sys.path.insert(0, str(folder))


def installed(name: str) -> bool:
    return importlib.util.find_spec(PEERS[name].module) is not None
