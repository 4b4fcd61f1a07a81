"""Read what observability.py recorded, and record a script that has no call sites.

Copy this file beside observability.py; every command is one of that file:

    python observability.py summarize out/*              a table of runs, dead or alive
    python observability.py verify out/fit               every byte that has a checksum
    python observability.py plot out/fit                 the curves as an image
    python observability.py run train.py --lr 3e-4       a script as it is, recorded

and rebuild, export, diff, rm, parity and tb; each has --help. Exit status 0: it is so; 1: it is
not; 2: the question could not be answered.

What it promises: a run is only read, but by rebuild (its events), plot (its plots/) and rm, and of
a living run nothing is removed. verify has an answer whatever bytes a file holds; a fifo or a
device in a file's place is refused by name. It needs the standard library, matplotlib for plot,
TensorBoard for tb, and torch for run alone.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import csv
import functools
import importlib.machinery
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import statistics
import struct
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import observability as obs

JOURNAL = "metrics.ndjson"
LONGEST = 16 << 20  # bytes of a journal's line or of an event: ours are far shorter
TOLERANCE, TOLERANCE_LAST = 5e-4, 1e-4  # nats: how far the reference curve moves between devices


class LogError(obs.ObservabilityError):
    """A log is missing, is not JSON lines, or holds no validation loss."""


class ToolError(obs.ObservabilityError):
    """A command lacks what it needs: a package, a free port."""


# --- Command line ---------------------------------------------------------------------------------

Command = Callable[[argparse.Namespace], int | None]
_commands: dict[str, tuple[Command, str, tuple[Any, ...]]] = {}


def command(text: str, *arguments: Any) -> Callable[[Command], Command]:
    """Register a function as the command of its name, which follows `command_`."""

    def register(function: Command) -> Command:
        _commands[function.__name__.removeprefix("command_")] = (function, text, arguments)
        return function

    return register


def argument(*flags: str, **options: Any) -> Any:
    """What argparse's add_argument is to be given."""
    return flags, options


RUN = argument("run", type=Path, metavar="RUN", help="a run's directory")
RUNS = argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
TWO_RUNS = argument("runs", nargs=2, type=Path, metavar="RUN", help="a run's directory")
AS_JSON = argument("--json", action="store_true", help="print JSON")
AS_CSV = argument("--csv", action="store_true", help="print CSV")
METRICS = argument("--output", type=Path, metavar="FILE.csv", help="a row for each metric by phase")
CLEAN = argument("--clean", action="store_true", help="without what a resumed run made again")
NDJSON = argument("--output", type=Path, metavar="FILE", help="instead of standard output")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: it is so; 1: it is not; 2: the question could not be answered."""
    parser = argparse.ArgumentParser("observability.py", description="Look at what was recorded.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (function, text, its_arguments) in _commands.items():
        added = subparsers.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        for flags, options in its_arguments:
            added.add_argument(*flags, **options)
    return _run_command(parser.parse_args(arguments))


def _run_command(options: argparse.Namespace) -> int:
    if options.command is command_run:
        return int(command_run(options) or 0)  # what the script raises is its own
    try:
        status: int = options.command(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads us has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (obs.ObservabilityError, OSError) as error:
        obs.say(str(error))
        return 2


def answers(question: Callable[[Any], Any], subjects: Iterable[Any]) -> list[Any]:
    """What it returns for each; for whom it has no answer, and why, is said on stderr."""
    found = []
    for subject in subjects:
        try:
            found.append(question(subject))
        except (obs.ObservabilityError, OSError) as error:
            obs.say(str(error))
    return found


def aligned(rows: Iterable[Iterable[str]]) -> str:
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def as_json(value: Any, indent: int | None = 1) -> str:
    return json.dumps(obs.to_json(value), indent=indent)


# --- A run's files --------------------------------------------------------------------------------


class Stream(NamedTuple):
    """One journal of a run, and what was written beside it."""

    dir: Path
    filename: str = JOURNAL

    @property
    def name(self) -> str:
        name = self.dir.absolute().name
        return name if self.filename == JOURNAL else f"{name}:{self.filename}"

    def document(self, name: str) -> Path:
        """Of eval.ndjson config.json is config.eval.json, and .lock is .eval.lock."""
        stream = Path(self.filename).stem.removeprefix("metrics")
        head, _, end = name.rpartition(".")
        return self.dir / (f"{head}.{stream}.{end}" if stream else name)

    def read(self, name: str) -> dict[str, Any]:
        """A document; {} where there is none, and where it is damaged, which is said."""
        try:
            return obs.read_sealed(self.document(name))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (obs.DamageError, OSError) as error:
            obs.say(str(error))
            return {}

    def config(self) -> dict[str, Any]:
        """What says that this is a run of ours. Raises RunError."""
        config = self.read("config.json")
        if not {"run", "config", "tb_dir"} <= config.keys():
            raise obs.RunError(f"{self.dir} holds no config.json of ours; give a run's directory")
        return config

    def beside(self, name: object) -> Path:
        """A file by the name that the run has for it."""
        return Path(os.path.normpath(self.dir.absolute() / str(name)))

    def events(self) -> list[Path]:
        """Ours alone; a SummaryWriter's may lie beside them."""
        directory = self.beside(self.config()["tb_dir"])
        return [directory / name for name in obs.event_files(directory)]

    def alive(self) -> bool:
        try:
            with obs.open_regular(self.document(".lock")) as lock:
                return not obs.flock(lock.fileno(), shared=True)
        except (obs.DamageError, OSError):
            return False

    def refuse_living(self) -> None:
        if self.alive():
            raise obs.RunError(f"{self.dir} is still being written; wait for the run's end")


def streams(path: Path) -> list[Stream]:
    """The journals of a run, metrics.ndjson first; of a journal, that one."""
    if path.suffix == ".ndjson":
        return [Stream(path.parent, path.name)]
    names = {re.sub(r"\.\d{4,}(?=\.ndjson$)", "", file.name) for file in path.glob("*.ndjson")}
    others = (Stream(path, name) for name in sorted(names - {JOURNAL}))
    own = [other for other in others if other.document("config.json").exists()]
    return own if own and JOURNAL not in names else [Stream(path), *own]


# --- summarize ------------------------------------------------------------------------------------

Points = tuple["array.array[int]", "array.array[float]"]  # steps and values


class Recording:
    """The numbers of one stream, sixteen bytes for each."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.metrics: dict[tuple[str, str], Points] = {}  # by phase and name
        self.resumed_at: list[int] = []
        self.steps = self.seq = 0
        self.wall_s, last_time = 0.0, math.inf
        damage: list[str] = []
        for record in obs.read_run(*stream, damage=damage):
            self._add(record)
            if record["tags"].get("event") == "resume":
                self.resumed_at.append(record["step"])
            else:  # there the time lies between two processes
                self.wall_s += max(0.0, record["time"] - last_time)
            last_time = record["time"]
        if damage:
            obs.say(f"{damage[0]} (lines passed over: {len(damage)}; see verify)")

    def _add(self, record: Mapping[str, Any]) -> None:
        self.steps, self.seq = max(self.steps, record["step"]), record["seq"]
        for name, value in record["metrics"].items():
            key = (record["tags"]["phase"], name)
            if key not in self.metrics:
                self.metrics[key] = array.array("q"), array.array("d")
            self.metrics[key][0].append(record["step"])
            self.metrics[key][1].append(float(value))

    def summary(self) -> dict[str, Any]:
        """The run in a line: how it ended, its losses, its median speed, its memory."""
        results = self.stream.read("results.json")
        ended = results.get("records", 0) >= self.seq  # else it was resumed since
        status = results.get("status") if ended else None
        values = {name: points[1] for (_, name), points in self.metrics.items()}
        last = {name: numbers[-1] for name, numbers in values.items()}
        losses = self.metrics.get(("eval", "loss/val_step"), ((), ()))
        known = ((loss, step) for step, loss in zip(*losses) if not math.isnan(loss))
        best = min(known, default=(None, None))
        speeds, rss = values.get("speed/tokens_per_sec_step"), last.get("system/rss_bytes")
        return {
            "run": self.stream.name,
            "status": "running" if self.stream.alive() else status or "killed",
            "steps": self.steps,
            "train_loss": last.get("loss/train"),
            "val_loss": last.get("loss/val_step"),
            "best_val_loss": best[0],
            "best_step": best[1],
            "lr": last.get("lr"),
            "tokens_per_sec": speeds and statistics.median_high(speeds),
            "wall_s": self.wall_s,
            "rss_mb": rss and rss / 1e6,
        }

    def statistics(self) -> Iterator[dict[str, Any]]:
        """A row for each metric by phase; the range and the mean are of its finite values."""
        for (phase, name), (_, values) in sorted(self.metrics.items()):
            finite = [value for value in values if math.isfinite(value)]
            counts = {"count": len(values), "non_finite": len(values) - len(finite)}
            ends = {"first": values[0], "last": values[-1]}
            spread = {"min": min(finite, default=None), "max": max(finite, default=None)}
            spread["mean"] = statistics.fmean(finite) if finite else None
            about = {"run": self.stream.name, "phase": phase, "metric": name}
            yield {**about, **counts, **ends, **spread}


def summary(run_dir: Path, filename: str = JOURNAL) -> dict[str, Any]:
    """A run in a line; what is not known is None."""
    return Recording(Stream(run_dir, filename)).summary()


@command("a table of runs, dead or alive", RUNS, AS_JSON, AS_CSV, METRICS)
def command_summarize(options: argparse.Namespace) -> int:
    recordings = answers(Recording, itertools.chain.from_iterable(map(streams, options.runs)))
    rows = [recording.summary() for recording in recordings]
    if not rows:  # and answers() has said of each why it is no run
        return 2
    if options.output:
        metrics = [row for recording in recordings for row in recording.statistics()]
        obs.replace_file(spared(options.output), _csv(metrics))
    cells = [list(rows[0]), *(map(_cell, row.values()) for row in rows)]
    print(as_json(rows) if options.json else _csv(rows).rstrip() if options.csv else aligned(cells))
    return 0


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0] if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


# --- verify: the journal --------------------------------------------------------------------------

_RECORD = re.compile(rb'\{"schema":(\d+),"seq":(\d+),"time":[^,]+,"step":(-?\d+),"metrics":\{')
# A record's end, or all of it but one byte: where such a line is not whole, no kill has torn it.
_END = re.compile(rb',"crc":\d*[^\d\n]|\}.{7}\d+\}\n?$', re.DOTALL)


def fence(what: object, found: Iterator[str]) -> Iterator[str]:
    """A file that cannot be read through is one damage, and the others are still checked."""
    try:
        yield from found
    except (obs.ObservabilityError, OSError) as error:
        yield str(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        yield f"{what} is not of the form that a run writes: {error!r}"


class JournalCheck:
    """The lines of one stream: their checksums, and by their numbers which of them are missing."""

    ABSENT, NO_STEP = -2, -1  # in `steps`: there is no such record; it is of no step
    FAR = 1 << 20  # records that may be missing in a row

    def __init__(self, stream: Stream) -> None:
        self.name, self.shards = stream.filename, obs.shards(*stream)
        self.records = self.first = self.last = 0  # how many there are, and their numbers
        self.steps = array.array("q", [0])  # of the train records, by number
        self.resumes: list[dict[str, Any]] = []  # their tags
        self.torn = ""  # where a line stands that the next one has to explain

    def damage(self) -> Iterator[str]:
        for shard in self.shards:
            yield from fence(shard, self._in_shard(shard))
        if [shard.name for shard in self.shards][-1:] != [self.name]:
            yield f"{self.name} is missing"

    def _in_shard(self, shard: Path) -> Iterator[str]:
        with obs.open_regular(shard) as file:
            for number, line in enumerate(iter(functools.partial(file.readline, LONGEST), b""), 1):
                yield from self._in_line(f"{shard.name}, line {number}", line)
                if len(line) == LONGEST:  # and who knows how much longer it is
                    return

    def _in_line(self, where: str, line: bytes) -> Iterator[str]:
        """What is wrong with a line, or was with a torn one before it; mostly nothing."""
        body, _, end = line.rpartition(b',"crc":')
        whole = end.rstrip(b"\n") == b"%d}" % zlib.crc32(body)
        record = _RECORD.match(line) if whole else None
        tags = body[body.rfind(b'"tags":{') :] if record else b""
        event = self._event(line) if b'"event"' in tags else ""
        torn, self.torn = self.torn, ""
        if torn and event not in ("start", "resume"):
            yield f"{torn}: a torn line, and no resume follows it"
        if record:
            train = b'"train"' in tags[:30]
            step = max(int(record[3]), 0) if train else self.NO_STEP
            yield from self._note(where, record, step)
        elif b'{"schema":'.startswith(line[:10].rstrip()) and not _END.search(line):
            self.torn = where
        else:
            yield f"{where}: not the line that was written"

    def _event(self, line: bytes) -> str:
        record = obs.parse_line(line) or {"seq": 0, "tags": {}}
        tags = record["tags"]
        if tags.get("parent"):  # a fork, which may go on with the numbers of that run
            self.first = record["seq"]
        elif tags.get("event") == "resume":
            self.resumes.append(tags)
        return str(tags.get("event"))

    def _note(self, where: str, record: re.Match[bytes], step: int) -> Iterator[str]:
        seq = int(record[2])
        last, self.records, self.last = self.last, self.records + 1, max(self.last, seq)
        if int(record[1]) > obs.SCHEMA:
            raise obs.RunError(f"{self.name} is of a newer schema; use the file that wrote it")
        if seq >= len(self.steps):
            self._reach(seq)
            self.steps.append(step)
        elif self.steps[seq] == self.ABSENT:
            self.steps[seq] = step
            yield f"{where}: record {seq} stands behind record {last}"
        else:
            yield f"{self.name}: record {seq} stands there twice"

    def _reach(self, seq: int) -> None:
        if seq > len(self.steps) + self.FAR:
            raise obs.DamageError(f"{self.name}: record {seq} follows record {len(self.steps) - 1}")
        self.steps.extend([self.ABSENT] * (seq - len(self.steps)))

    def gaps(self, last: int, last_step: int) -> Iterator[str]:
        """Which records are missing up to the last one, as another file knows it."""
        if last >= len(self.steps):
            self._reach(last + 1)
            self.steps.append(last_step + 1)
        absent = [seq for seq, step in enumerate(self.steps) if step == self.ABSENT]
        absent = [seq for seq in absent if seq > self.first]
        for _, group in itertools.groupby(enumerate(absent), lambda pair: pair[1] - pair[0]):
            numbers = [seq for _, seq in group]
            yield self._gap(numbers[0], numbers[-1])

    def _gap(self, first: int, last: int) -> str:
        """In words, with the steps that no record near it is of."""
        before = [step for step in self.steps[max(0, first - 999) : first] if step >= 0]
        after = [step for step in self.steps[last + 1 : last + 999] if step >= 0]
        steps = ""
        if before and after and after[0] > before[-1] + 1:
            steps = f", {span('step', before[-1] + 1, after[0] - 1)}"
        are = "is" if first == last else "are"
        return f"{self.name}: {span('record', first, last)} {are} missing{steps}"


def span(noun: str, first: int, last: int) -> str:
    return f"{noun} {first}" if first == last else f"{noun}s {first} to {last}"


# --- verify: the run ------------------------------------------------------------------------------

REBUILT = ".rebuilt.obs"  # how the name of an event file ends that took the place of all others
KEPT, PRINTED = 1000, 20  # of the sentences about a run


class StreamCheck:
    """Every byte of a stream that has a checksum, and every file that it says it has."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.alive = stream, stream.alive()
        self.journal = JournalCheck(stream)
        self.documents: dict[str, dict[str, Any]] = {}
        self.checkpoints = self.events = 0
        self.known = (0, 0)  # the last record that a checkpoint or the results know of; its step

    def damage(self) -> Iterator[str]:
        for name in ("config.json", "run_manifest.json", "results.json"):
            yield from fence(name, self._in_document(name))
        yield from fence(".lock", self._in_lock())
        yield from self.journal.damage()
        if self.stream.filename == JOURNAL and "config.json" in self.documents:
            yield from fence("a checkpoint", self._in_checkpoints())
        yield from fence(self.journal.name, self.journal.gaps(*self.known))
        if "config.json" in self.documents:
            yield from fence("an event file", self._in_events())

    def _in_document(self, name: str) -> Iterator[str]:
        path = self.stream.document(name)
        if os.path.lexists(path) or name == "config.json":
            self.documents[name] = content = obs.read_sealed(path)
            if name == "results.json" and not self.alive:
                self.known = (content["records"], content["last_step"])
        elif name == "results.json" and "ended" in self.documents.get("run_manifest.json", {}):
            yield f"{path} is missing, though the run's manifest says that it had ended"

    def _in_lock(self) -> Iterator[str]:
        path = self.stream.document(".lock")
        if path.exists() and not self.alive:
            with obs.open_regular(path) as file:
                data = file.read(4096)
            text = data.decode(errors="replace").rpartition(obs.CRC_MARK)[0]
            if data and data != obs.with_crc(text):
                yield f"{path} is not what was written"

    def _in_checkpoints(self) -> Iterator[str]:
        config = self.documents["config.json"]
        top = self.stream.beside(config["checkpoints"])
        found = [each for folder in (top, *top.glob("rank*")) for each in obs.checkpoints(folder)]
        self.checkpoints = len(found)
        for path, state in found:
            damage = obs.checkpoint_damage(path)
            if damage and (path.exists() or not self.alive):  # else its run has just removed it
                yield f"{path}: {damage}"
            elif state.get("run_id") == config["id"] and not self.alive:
                self.known = max(self.known, (state["seq"], state["global_step"]))
        yield from (f"{path} was set aside as damaged" for path in top.glob(".corrupt-*"))
        for link in (top / "latest", top / "best"):
            if link.is_symlink() and not link.exists():
                yield f"{link} points to {os.readlink(link)}, which is not there"

    def _in_events(self) -> Iterator[str]:
        results = self.documents.get("results.json", {})
        ended = results and results["records"] >= self.journal.last and not self.alive
        if ended and self.journal.torn:
            yield f"{self.journal.torn}: a torn line, though the run had ended"
        sizes = self._noted_sizes(results["files"] if ended else {})
        found = self.stream.events()
        self.events = len(found)
        for path in found:
            yield from fence(path, event_damage(path, may_be_torn=path not in sizes))
        for path, size in sizes.items():
            bytes_now = path.stat().st_size if path.exists() else "no"
            if bytes_now != size:
                yield f"{path} has {bytes_now} bytes, and had {size}"

    def _noted_sizes(self, files: Mapping[str, int]) -> dict[Path, int]:
        """By resumes, of the event files before them, and at the end, of all files."""
        events = self.stream.events()
        folder = self.stream.beside(self.documents["config.json"]["tb_dir"])
        noted = [item for tags in self.journal.resumes for item in tags["events"].items()]
        sizes = {folder / name: size for name, size in noted}
        if any(path.name.endswith(REBUILT) for path in events):
            sizes = {path: size for path, size in sizes.items() if path in events}
        kind = self.stream.filename.partition(".")[0]  # another stream's journal may go on
        own = (name for name in files if name.endswith(".obs") or name.partition(".")[0] == kind)
        return sizes | {self.stream.beside(name): files[name] for name in own}


def verify(run_dir: Path) -> dict[str, Any]:
    """What was checked, and a sentence for each damage. Raises RunError where there is no run."""
    checks = [StreamCheck(stream) for stream in streams(run_dir)]
    if not any(check.journal.shards for check in checks):
        raise obs.RunError(f"{run_dir} holds no {JOURNAL}; give the directory of a run")
    found = itertools.chain.from_iterable(check.damage() for check in checks)
    damage = list(itertools.islice(found, KEPT))
    count = len(damage) + sum(1 for _ in found)
    counts = [(check.checkpoints, check.journal.records, check.events) for check in checks]
    totals = map(sum, zip(*counts))
    checked = "{} checkpoints, {} records, {} event files".format(*totals)
    return {"run": str(run_dir), "checked": checked, "damage": damage, "count": count}


@command("check every byte of runs that has a checksum", RUNS, AS_JSON)
def command_verify(options: argparse.Namespace) -> int:
    found = answers(verify, options.runs)
    if options.json:
        print(as_json(found))
    for each in [] if options.json else found:
        more = [f"… and {each['count'] - PRINTED} more"] if each["count"] > PRINTED else []
        verdict = f"{each['count']} damaged" if each["count"] else "whole"
        lines = [*each["damage"][:PRINTED], *more, f"{each['run']}: {each['checked']}: {verdict}"]
        print("\n".join(lines))
    return 1 if any(each["count"] for each in found) else 2 * (len(found) < len(options.runs))


# --- verify: event files --------------------------------------------------------------------------

# TFRecord: the length, its masked CRC32C, the event, its masked CRC32C.
_LENGTH = struct.Struct("<Q4s")
# What is in the first two events: brain.Event:2, and session_log{status: START}.
_BEGINNING = (b"brain.Event:2", b"\x3a\x02\x08\x01")
_BATCH = 2048  # events that are checked together


def event_damage(path: Path, *, may_be_torn: bool) -> Iterator[str]:
    """What is wrong with an event file; a torn last event is a kill's, and harms no reader."""
    with obs.open_regular(path) as file:
        events = _events(file, may_be_torn)
        head = list(itertools.islice(events, 2))
        for (at, body), begins in zip(head, _BEGINNING):
            if begins not in body:
                yield f"{path}: the event at byte {at} does not begin a file"
        events = itertools.chain(head, events)
        while batch := list(itertools.islice(events, _BATCH)):
            for at in _wrong_events(batch):
                yield f"{path}: the event at byte {at} is not what was written"


def _events(file: BinaryIO, may_be_torn: bool) -> Iterator[tuple[int, bytes]]:
    """Each event with its checksum, and where it begins. Raises DamageError where none does."""
    at, size, known = 0, 0, b""
    while head := file.read(_LENGTH.size):
        if head != known and len(head) == _LENGTH.size:
            length, crc = _LENGTH.unpack(head)
            if obs.masked_crc(head[:8]) != crc or length > LONGEST:
                raise obs.DamageError(f"{file.name}: no event begins at byte {at}")
            known, size = head, length + 4
        body = file.read(size)
        if len(body) < size or head != known:
            if not may_be_torn:
                raise obs.DamageError(f"{file.name}: the event at byte {at} is torn")
            return
        yield at, body
        at += len(head) + size


def _wrong_events(events: Iterable[tuple[int, bytes]]) -> Iterator[int]:
    """Where those begin whose checksum is not that of their bytes."""
    by_size: dict[int, list[tuple[int, bytes]]] = {}
    for event in events:
        by_size.setdefault(len(event[1]), []).append(event)
    for alike in by_size.values():
        crcs = _masked_crcs([body[:-4] for _, body in alike])
        yield from (at for (at, body), crc in zip(alike, crcs) if body[-4:] != crc)


def _masked_crcs(bodies: Sequence[bytes]) -> list[bytes]:
    """The masked CRC32C of messages of one length, a byte of all of them at a time.

    A step of the CRC looks the message's byte, with the register's lowest, up in a table of 256.
    `bytes.translate` looks up for all messages in one call; the four bytes of their registers are
    four integers, of as many bytes as there are messages. That is some 10 ns for each byte, where
    a loop over the bytes takes ten times as long.
    """
    count, joined = len(bodies), b"".join(bodies)
    ones = (1 << 8 * count) - 1
    registers = [ones] * 4
    shifts = (0, 8, 16, 24)
    tables = [bytes(entry >> shift & 0xFF for entry in obs.crc_table(0)) for shift in shifts]
    for column in range(len(bodies[0])):
        byte = registers[0] ^ int.from_bytes(joined[column :: len(bodies[0])], "little")
        index = byte.to_bytes(count, "little")
        found = [int.from_bytes(index.translate(table), "little") for table in tables]
        registers = [a ^ b for a, b in zip([*registers[1:], 0], found)]
    columns = [(register ^ ones).to_bytes(count, "little") for register in registers]
    crcs = (sum(byte << shift for byte, shift in zip(c, shifts)) for c in zip(*columns))
    return [obs.masked_crc_bytes(crc) for crc in crcs]


# --- rebuild, export, diff, rm --------------------------------------------------------------------


@command("write a run's TensorBoard events anew from its journal", RUN)
def command_rebuild(options: argparse.Namespace) -> None:
    print(rebuild(options.run))


def rebuild(run_dir: Path) -> Path:
    """Write the run's TensorBoard events anew from its journal, and return their directory."""
    found = streams(run_dir)
    for stream in found:
        stream.refuse_living()
    directories = [_rebuild_stream(stream) for stream in found]
    return directories[0]


def _rebuild_stream(stream: Stream) -> Path:
    old, directory = stream.events(), stream.beside(stream.config()["tb_dir"])
    results = stream.read("results.json")
    last = max((record["seq"] for record in obs.read_run(*stream, superseded=True)), default=0)
    if results and last < results["records"] and old:
        raise obs.RunError(
            f"{stream.dir} has {last} of its {results['records']} records; its events are kept, "
            "for they may have more"
        )
    staging = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    try:
        obs.TensorBoard(staging, obs.read_run(*stream)).close()
        directory.mkdir(parents=True, exist_ok=True)
        for path in old:
            path.unlink()
        for name in obs.event_files(staging):
            os.replace(staging / name, directory / f"{name.removesuffix('.obs')}{REBUILT}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if results:  # it names the files that there were
        files = {name: size for name, size in results["files"].items() if name[-4:] != ".obs"}
        files |= {
            os.path.relpath(path, stream.dir): path.stat().st_size for path in stream.events()
        }
        content = {name: results[name] for name in results.keys() - {"self_crc32"}}
        obs.replace_file(stream.document("results.json"), obs.seal({**content, "files": files}))
    return directory


@command("write a run's records as one NDJSON stream", RUN, CLEAN, NDJSON)
def command_export(options: argparse.Namespace) -> None:
    records = obs.read_run(*streams(options.run)[0], superseded=not options.clean)
    lines = (obs.Record.of(record).line() for record in records)
    if options.output is None:
        sys.stdout.buffer.writelines(lines)
        sys.stdout.flush()
        return
    with spared(options.output).open("wb") as file:
        file.writelines(lines)


def spared(output: Path) -> Path:
    """A file to write to, that is none of a run's. Raises RunError."""
    if (output.absolute().parent / "config.json").exists():
        raise obs.RunError(f"{output} lies in a run's directory; write somewhere else")
    return output


@command("show what two runs were given, ran on and ended in, where it differs", TWO_RUNS, AS_JSON)
def command_diff(options: argparse.Namespace) -> int:
    found = diff(*options.runs)
    rows = [[name, *(as_json(each, None)[:60] for each in pair)] for name, pair in found.items()]
    print(as_json(found) if options.json else aligned([["", *map(str, options.runs)], *rows]))
    return 1 if any(name.startswith("config.") for name in found) else 0


def diff(one: Path, other: Path) -> dict[str, list[Any]]:
    """The two values of each fact that differs, by its dotted name; None where there is none."""
    a, b = dict(_facts(streams(one)[0])), dict(_facts(streams(other)[0]))
    pairs = {name: [a.get(name), b.get(name)] for name in sorted({**a, **b})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _facts(stream: Stream) -> Iterator[tuple[str, Any]]:
    config = stream.config()
    yield from _flat("config", {name: config.get(name) for name in ("config", "dataset", "models")})
    for name, short in (("run_manifest.json", "manifest"), ("results.json", "results")):
        content = stream.read(name)
        own = {"self_crc32", "schema", "run", "hyperparameters", "files", "started", "ended"}
        yield from _flat(short, {name: content[name] for name in content.keys() - own})


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not value or not isinstance(value, dict | list):
        yield name, value
        return
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(f"{name}.{key}", each)


@command("delete runs that have ended, and their events", RUNS)
def command_rm(options: argparse.Namespace) -> None:
    doomed = {run.absolute(): removable(run) for run in options.runs}  # all, before one is removed
    for run_dir, events in doomed.items():
        remove(run_dir, events)
        print(f"removed {run_dir}")


def removable(run_dir: Path) -> list[Path]:
    """The event files of a run that may be removed. Raises RunError for anything else."""
    if run_dir.is_symlink() or not run_dir.is_dir():
        raise obs.RunError(f"{run_dir} is no directory, or a link to one; give a run's directory")
    found = streams(run_dir)
    for stream in found:
        stream.refuse_living()
    events = (path for stream in found for path in stream.events())
    return [path for path in events if not path.parent.is_symlink()]


def remove(run_dir: Path, events: Iterable[Path]) -> None:
    """By a rename first: a run is there whole, or not under its name. No link is followed."""
    doomed = run_dir.with_name(f".tmp-{run_dir.name}-{os.getpid()}")
    os.rename(run_dir, doomed)
    for path in events:
        path.unlink()
    for directory in sorted({path.parent for path in events}, reverse=True):
        with contextlib.suppress(OSError):  # another's files lie there too
            directory.rmdir()
    shutil.rmtree(doomed)


# --- plot -----------------------------------------------------------------------------------------

# A panel's title, and the metrics that share its unit.
_PANELS = {
    "loss": r"loss/(train(/\d+)?|val_step)",
    "learning rate": r"lr(/\d+)?",
    "tokens per second": r"speed/tokens_per_sec_step",
    "samples per second": r"speed/samples_per_sec_step",
    "seconds per step": r"speed/step_s",
    "gradient norm": r"(.*[/_])?grad(ient)?_norm",
    "memory in bytes": r"(system/.*(rss|cuda)|gpu_memory).*_bytes(/\d+)?",
}
_NOT_DRAWN = r"loss/val|speed/tokens_per_sec|system/.*"  # the first two are of epochs
_LAST_PART = r"/(train|val|val_step|test|\d+)$"  # accuracy/train and accuracy/val share a unit
_MOST_PANELS = 15
_WIDE = 500  # points of a curve; where there are more, the mean and the range of neighbours


def plot(run_dir: Path) -> Path:
    """Draw the run so far, for good under its time and step, and as plots/latest.png.

    Raises RunError where there is no journal, ToolError where matplotlib is missing.
    """
    recording = Recording(streams(run_dir)[0])
    image = io.BytesIO()
    drawing(recording).savefig(image, format="png", dpi=110)
    (run_dir / "plots").mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
    path = run_dir / "plots" / f"curves_{stamp}_step_{recording.steps:08d}.png"
    obs.replace_file(path, image.getvalue())
    obs.replace_file(path.with_name("latest.png"), image.getvalue())
    return path


def panels(recording: Recording) -> dict[str, dict[str, Points]]:
    """The curves by the titles of their panels: those of unlike units are never in one."""
    found: dict[str, dict[str, Points]] = {title: {} for title in _PANELS}
    for (_, name), points in recording.metrics.items():
        titles = (title for title, names in _PANELS.items() if re.fullmatch(names, name))
        title = next(titles, None)
        if title or not re.fullmatch(_NOT_DRAWN, name):
            found.setdefault(title or re.sub(_LAST_PART, "", name), {})[name] = points
    return {title: curves for title, curves in found.items() if curves}


def drawing(recording: Recording) -> Any:
    """A figure: the first panel over the whole width, the others in two columns beneath."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        install = f"{sys.executable} -m pip install matplotlib"
        raise ToolError(f"matplotlib is not installed; {install}") from error
    drawn = list(panels(recording).items())[:_MOST_PANELS]
    rows = 1 + len(drawn) // 2
    figure = Figure(figsize=(11, 1.5 + 2.4 * rows), layout="constrained")
    run = recording.summary()
    title = "{run}: {status} at step {steps:,}".format_map(run)
    if run["best_step"] is not None:
        title += "; best validation loss {best_val_loss:.5g} at step {best_step:,}".format_map(run)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    grid = figure.add_gridspec(rows, 2, height_ratios=[1.5, *[1] * (rows - 1)])
    for at, (title, curves) in enumerate(drawn, 1):
        alone = at == 1 or (at == len(drawn) and at % 2 == 0)
        axes = figure.add_subplot(grid[at // 2, :] if alone else grid[at // 2, at % 2])
        draw(axes, title, curves, recording.resumed_at)
    return figure


def draw(axes: Any, title: str, curves: Mapping[str, Points], resumed_at: Sequence[int]) -> None:
    from matplotlib.ticker import EngFormatter

    for number, (name, (steps, values)) in enumerate(curves.items()):
        finite = [at for at, value in enumerate(values) if math.isfinite(value)]
        width = 1 + len(finite) // _WIDE
        parts = [finite[at : at + width] for at in range(0, len(finite), width)]
        near = [[values[at] for at in part] for part in parts]
        x = [steps[part[len(part) // 2]] for part in parts]
        look = {"color": f"C{number}", "marker": "o" if len(x) <= 60 else "", "markersize": 3}
        axes.plot(x, [*map(statistics.fmean, near)], label=name, **look)
        if width > 1:
            band = {"color": f"C{number}", "alpha": 0.2, "linewidth": 0}
            axes.fill_between(x, [*map(min, near)], [*map(max, near)], **band)
        if odd := [steps[at] for at, value in enumerate(values) if not math.isfinite(value)]:
            place = {"transform": axes.get_xaxis_transform(), "label": f"{name} is not finite"}
            axes.plot(odd, [0.03] * len(odd), "rx", **place)
    for number, step in enumerate(resumed_at):
        label = "resumed" if number == 0 else None  # once in the legend
        axes.axvline(step, color="grey", linestyle=":", linewidth=1, label=label)
    # Above the panel, where no curve is.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set(xlabel="step", ylabel=title)
    if re.search("per second|bytes", title):
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


@command("draw a run's curves into its plots/, by matplotlib", RUN)
def command_plot(options: argparse.Namespace) -> None:
    with contextlib.suppress(AttributeError, OSError):  # Windows
        os.nice(19)  # the cores are the training's
    print(plot(options.run))


# --- parity ---------------------------------------------------------------------------------------


class LossCurve(NamedTuple):
    """What a log says of the data, of its own tolerance, and the validation loss by step."""

    dataset: dict[str, Any]
    about: dict[str, Any]
    points: dict[int, float]


def read_curve(path: Path) -> LossCurve:
    """From the training script's JSON lines, or from a run's directory."""
    curve = LossCurve({}, {}, {})
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
        yield from obs.read_run(*streams(path)[0])
        return
    try:
        with obs.open_regular(path) as file:
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError, obs.DamageError) as error:
        raise LogError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):  # the last line may be torn, by a kill
                raise LogError(f"{path}, line {number} is no JSON object: {error}") from error


def parity(
    log: LossCurve, baseline: LossCurve, tolerance: float, last_tolerance: float
) -> dict[str, Any]:
    """Compare two curves at every point of the baseline.

    Tolerances are in the loss's unit, 0 for equal bits. The verdict is "match", "differs",
    "another dataset" or "unfinished".
    """
    result: dict[str, Any] = {"tolerance": tolerance, "last_tolerance": last_tolerance}
    if other := other_facts(log, baseline):
        return {"verdict": "another dataset", "dataset": other, **result}
    steps, end = sorted(baseline.points), max(baseline.points)
    off = {step: abs(log.points.get(step, math.nan) - baseline.points[step]) for step in steps}
    within = {step: off[step] <= tolerance for step in steps}  # a NaN is not
    within[end] = off[end] <= last_tolerance
    step = next((step for step in steps if not within[step]), end)
    unfinished = step not in log.points and step > max(log.points)
    verdict = "match" if within[step] else "unfinished" if unfinished else "differs"
    found = {"verdict": verdict, "points": len(steps), "largest": max(off.values()), "step": step}
    pair = {"got": log.points.get(step), "expected": baseline.points[step]}
    return {**found, **pair, "off": off[step], **result}


def other_facts(log: LossCurve, baseline: LossCurve) -> dict[str, list[Any]]:
    """The facts of the data that both state and that differ."""
    names = ("titles_count", "tokens_per_epoch", "batches_per_epoch", "vocab_size", "sha256")
    pairs = {name: [log.dataset.get(name), baseline.dataset.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}


def sentence(result: Mapping[str, Any]) -> str:
    """What `parity` found, in words."""
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


LOG = argument("log", type=Path, help="JSON lines of the script, or a run's directory")
BASELINES = argument("baseline", nargs="+", type=Path, help="of several, that of the same data")
ON_ANY = argument("--tolerance", type=float, help="on any point; default: the baseline's own")
EXACT = argument("--exact", action="store_true", help="bit for bit")


@command("compare validation losses with a baseline's", LOG, BASELINES, ON_ANY, EXACT, AS_JSON)
def command_parity(options: argparse.Namespace) -> int:
    log, baselines = read_curve(options.log), [read_curve(path) for path in options.baseline]
    baseline = next((b for b in baselines if not other_facts(log, b)), baselines[0])
    tolerance = last = 0.0 if options.exact else options.tolerance
    if tolerance is None:
        tolerance = baseline.about.get("tolerance", TOLERANCE)
        last = baseline.about.get("tolerance_last", TOLERANCE_LAST)
    result = parity(log, baseline, tolerance, last)
    print(as_json(result, None) if options.json else f"{options.log} {sentence(result)}")
    return {"match": 0, "another dataset": 2}.get(result["verdict"], 1)


# --- tb -------------------------------------------------------------------------------------------

TB_DIR = argument("dir", nargs="?", type=Path, metavar="DIR", help="default: logs/tb")
PORT = argument("--port", type=int, default=os.environ.get("TB_PORT", "6006"), help="or TB_PORT")
HOST = argument("--host", default=os.environ.get("TB_HOST", "127.0.0.1"), help="or TB_HOST")


@command("start TensorBoard, by default on this machine's loopback", TB_DIR, PORT, HOST)
def command_tb(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        install = f"{sys.executable} -m pip install tensorboard"
        raise ToolError(f"TensorBoard is not installed; {install}")
    beside = obs.script_dir() / "logs/tb"
    directory = options.dir or (beside if beside.is_dir() else Path("logs/tb"))
    if not directory.is_dir():
        raise ToolError(f"{directory} is no folder; give the one that holds the runs' events")
    host, port = options.host, free_port(options.host, options.port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{url} shows {directory} (pid {os.getpid()}; Ctrl-C ends it)", flush=True)
    server = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory)]
    os.execv(sys.executable, [*server, "--host", host, "--port", str(port)])


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nothing listens at. Raises ToolError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, min(first + 100, 1 << 16)):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ToolError(f"{host} has no free port from {first} to {first + 99}; give another --port")


# --- run: a script without call sites -------------------------------------------------------------

Hook = Callable[..., None]


class ZeroEdit:
    """Records a script without call sites, by the hooks that torch has for every optimizer.

    A step is one of the optimizer that steps first; what the others' steps have is recorded with
    their number behind its name. The loss of a step is the last that was back-propagated, without
    what divided it by the number of micro-batches: as a call site is given it. Evaluations and the
    place in the loop cannot be seen.
    """

    SHARE = 0.005  # of the loop's time, that gradient norms may take

    def __init__(self, arguments: Sequence[str]) -> None:
        self.run: obs.Run | None = None
        self._config = config_of(arguments)
        self.steps = 0
        self._optimizers: list[Any] = []
        self._loss: Any = None  # that was back-propagated last
        self._divisors: list[float] = []  # what it was divided by, where that may matter
        self._scaler: Any = None  # whose scale() has been called since the gradients were zeroed
        self._backwards = 0  # since then
        self._counts: set[tuple[int, int]] = set()  # of those of a step, and of which optimizer
        self._norm: dict[str, Any] = {}
        self._norm_at = 0  # the step at which it is due
        self._began = self._mark = 0.0  # perf_counter() before the first step and after the last

    def install(self) -> None:
        """When torch has been imported, and before the script has used it."""
        from torch.optim import optimizer as optim

        torch = sys.modules["torch"]
        before, after = obs.fenced(self._before_step), obs.fenced(self._after_step)
        obs.register_hook(optim.register_optimizer_step_pre_hook, before)
        obs.register_hook(optim.register_optimizer_step_post_hook, after)
        wrap(torch.autograd, "backward", before=obs.fenced(self._note_loss))
        scaler = getattr(torch.amp, "GradScaler", None) or torch.cuda.amp.GradScaler
        wrap(scaler, "scale", after=obs.fenced(self._note_scaled))
        # Or the loss of a step that a GradScaler left out would be added to the next one's.
        wrap(optim.Optimizer, "zero_grad", before=obs.fenced(self._note_zeroed))
        wrap(torch.nn.Module, "zero_grad", before=obs.fenced(self._note_zeroed))

    def is_alone(self) -> bool:
        """Whether no run is open but ours: a script that has call sites is left to them."""
        return obs.current_run() is self.run

    def _note_zeroed(self, *_: Any, **__: Any) -> None:
        self._loss, self._scaler, self._backwards = None, None, 0

    def _note_scaled(self, _: Any, scaler: Any, *__: Any, **___: Any) -> None:
        self._scaler = scaler

    def _note_loss(self, tensors: Any, *_: Any, **__: Any) -> None:
        scale = getattr(self._scaler, "_scale", None)  # get_scale() would wait for the device
        for each in (each for each in obs.several(tensors) if each.numel() == 1):
            self._backwards += 1
            # Where nothing is accumulated the graph is not looked at: to read what it has saved
            # runs the hooks of whoever saves it elsewhere or computes it again.
            accumulates = max([self._backwards, *(count for _, count in self._counts)]) > 1
            self._divisors = divisors(each) if accumulates else []
            # A tensor of its own: the script's `loss *= micro_batches` is not to reach it.
            self._loss = each.detach() / (1 if scale is None else scale.to(each.device))

    def _take_loss(self, number: int) -> Any:
        """Of the step that an optimizer has made, undivided by a count of its micro-batches."""
        self._counts.add((number, self._backwards))
        loss, counts = self._loss, [count for of, count in self._counts if of == number]
        by = [n for n in counts for each in self._divisors if n > 1 and math.isclose(each, n)]
        self._note_zeroed()
        return loss * by[0] if loss is not None and by else loss

    def _is_wrapper(self, optimizer: Any) -> bool:
        """Whether it holds the one that steps: its own step() is called more often, by accelerate's
        for each micro-batch."""
        values = vars(optimizer).values()
        return any(isinstance(each, sys.modules["torch"].optim.Optimizer) for each in values)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if not self.is_alone() or self._is_wrapper(optimizer):
            return
        if self.run is None:
            self.run = obs.init(config=self._config, save_interval=0, resume="never")
            self._began = time.perf_counter()
        if not any(known is optimizer for known in self._optimizers):
            self._optimizers.append(optimizer)
            self.run.watch(optimizer=optimizer)
        if optimizer is self._optimizers[0] and self.steps >= self._norm_at:
            self._note_norm(optimizer)

    def _note_norm(self, optimizer: Any) -> None:
        """Of what the optimizer is about to apply: clipped and unscaled. As often as is cheap."""
        torch, began = sys.modules["torch"], time.perf_counter()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        grads = [g for g in grads if g is not None and g.layout is torch.strided]
        if grads and len({grad.device for grad in grads}) == 1:
            with torch.no_grad():
                norms = [norm.float() for norm in torch._foreach_norm(grads)]
                self._norm = {"grad_norm": torch.linalg.vector_norm(torch.stack(norms))}
        now = time.perf_counter()
        step_s = (now - self._began) / (self.steps + 1)
        if self.steps > 2:  # the first ones are slow and say nothing of the later
            self._norm_at = self.steps + 1 + int((now - began) / (self.SHARE * step_s))

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if self.run is None or not self.is_alone() or self._is_wrapper(optimizer):
            return
        number = next(i for i, known in enumerate(self._optimizers) if known is optimizer)
        loss = self._take_loss(number)
        if number:
            self.run.log({} if loss is None else {f"loss/train/{number}": loss}, self.steps)
            return
        now, metrics, self._norm = time.perf_counter(), self._norm, {}
        if self.steps:  # what came before the first step is not known
            metrics["speed/step_s"] = now - self._mark
        self._mark = now
        self.steps += 1
        self.run.step(loss=loss, **metrics)

    def finish(self, status: str) -> None:
        """Close the run; say what was recorded, and what it takes to record the rest."""
        if self.run is None or not self.is_alone():
            why = "no optimizer has stepped" if self.is_alone() else "it has call sites of its own"
            return obs.say(f"nothing is added to what the script records: {why}")
        self.run.finish(status)
        unseen = "evaluations are not seen and it cannot be resumed: for these patch the script"
        return obs.say(f"{self.steps} steps are in {self.run.dir}; {unseen} (README.md tells how)")


def divisors(loss: Any) -> list[float]:
    """What a loss was divided by at last, by numbers on the host: nothing waits for a device."""
    node, found = loss.grad_fn, []
    while (name := type(node).__name__) in ("DivBackward0", "MulBackward0"):
        other = node._saved_other
        if other is not None and other.device.type == "cpu" and other.numel() == 1 and other.item():
            found.append(other.item() if name[0] == "D" else 1 / other.item())
        node = node.next_functions[0][0]
    return found


def wrap(owner: Any, name: str, before: Hook | None = None, after: Hook | None = None) -> None:
    """Have an attribute's calls seen; `after` gets the result before the arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(result, *args, **kwargs)
        return result

    setattr(owner, name, call)


def when_imported(module: str, then: Hook) -> None:
    """Call back when the script has imported a module: were it imported before, it would not find
    what the script puts into the environment for it."""

    def loaded(*_: Any) -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
            then()

    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders have: whether it is asked for or imported is the same."""
        if name != module:
            return None
        others = [each for each in sys.meta_path if each is not finder]
        spec = next(filter(None, (each.find_spec(name, path, target) for each in others)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            wrap(spec.loader, "exec_module", after=loaded)
        return spec

    finder: Any = types.SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
    if sys.modules.get(module) is not None:
        loaded()


def config_of(arguments: Sequence[str]) -> dict[str, Any] | list[str]:
    """`--lr 3e-4 --name=x --fast` or `lr=3e-4` by name; what has another form, as it is."""
    config: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        name = option.lstrip("-").replace("-", "_")
        if not (equals or option.startswith("-")) or not name.isidentifier() or name in config:
            return list(arguments)
        if not equals:
            value = "true" if not rest or re.match(r"--?[^\W\d]", rest[0]) else rest.pop(0)
        config[name] = obs.attempt(functools.partial(json.loads, value), value)
    return config


def show_from(script: str, show: Hook, kind: Any, error: BaseException, trace: Any) -> None:
    """Show an error as plain Python does: from the script on, and none of our frames between."""
    frames: list[types.TracebackType] = []
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file == script or (frames and file != __file__):
            frames.append(trace)
        trace = trace.tb_next
    for each, following in zip(frames, [*frames[1:], None]):
        each.tb_next = following
    error.__traceback__ = frames[0] if frames else None
    show(kind, error, error.__traceback__)


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a training script as Python would, and record what can be seen from outside."""
    zero_edit, status = ZeroEdit(arguments), "completed"
    when_imported("torch", obs.fenced(zero_edit.install))
    path = os.path.join(os.getcwd(), script)  # as it was given, ./ and .. too
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).resolve().parent)
    if sys.path[-1] == str(Path(__file__).resolve().parent):
        sys.path.pop()  # by which this file was found
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main = types.ModuleType("__main__")  # to the end of the process
    vars(main).update(__builtins__=sys.modules["builtins"], __file__=path, __loader__=loader)
    try:
        exec(loader.source_to_code(loader.get_data(path), path), vars(main))
    except BaseException as error:  # the script's: its end is noted, and goes on up
        if not isinstance(error, SystemExit) or error.code not in (None, 0):
            status = f"failed: {type(error).__name__}"
        sys.excepthook = functools.partial(show_from, path, sys.excepthook)
        raise
    finally:
        zero_edit.finish(status)


SCRIPT = argument("script", metavar="TRAIN.PY")
REST = argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")


@command("run a training script as it is, and record what can be seen", SCRIPT, REST)
def command_run(options: argparse.Namespace) -> int:
    if not Path(options.script).is_file():
        obs.say(f"{options.script} is no file; give the training script")
        return 2
    run_script(options.script, options.arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
