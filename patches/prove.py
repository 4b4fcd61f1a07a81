"""Prove that a patched training script computes and says what the original does, to the last bit.

    python prove.py train.py -- ARGS              the original twice, the patched script once
    python prove.py train.py --steps 50 -- ARGS   the first 50 optimizer steps of each
    python prove.py train.py --kill 3 -- ARGS     and that a killed run comes to the same end
    python prove.py train.py --nproc 2 -- ARGS    as torchrun starts it, with two processes
    python prove.py train.py --patched mine.py    another patch than the one autopatch.py makes

Each run is a process of its own in a fresh copy of the script's folder, with the same seed. Noted
are the bits of every loss that is back-propagated, every float that the script reads off a tensor
(validation losses are among them), every optimizer step, and at the end all parameters, buffers,
optimizer states and random generators; every line that is printed, by the script or what it
starts; and every file that is written, changed or deleted, line by line where it is text, and of a
pickle or what torch.save wrote each value.

What the runs of the original print or write differently is masked: of a line the numbers that
vary, clocks and speeds at once. Not compared are progress bars, warnings, what other threads and
other ranks print, and files outside the folder that neither Python nor torch.save opened. An
original whose numbers differ from run to run is said to, and the verdict is then about how far it
drifts. What processes that the script starts compute is not watched.

Exit status: 0 identical, or within the script's own drift; 1 it differs; 2 no answer, and why.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from lines import PatchError, marked_numbers, reverse, split_lines
from recorder import COMPARED, COUNTED, UNREADABLE, Entry, Job, seen, shortened

__all__ = ["Options", "Unanswered", "main", "prove"]

HERE = Path(__file__).resolve().parent
DROP_IN = HERE.parent / "mainrun" / "observability.py"
SLACK = 2.0  # times the script's own drift, known from few samples, that the patched one may have
NOT_COPIED = {".git", ".venv", "venv", "node_modules", "__pycache__", "wandb", "runs", "out"}

T = TypeVar("T")
Difference = dict[str, Any]
# Runs `record` in a new process and returns its exit status; calls the function now and then.
Runner = Callable[[Job, Callable[[], None]], int]


class Unanswered(Exception):
    """There is no verdict; the message says why."""


@dataclass(frozen=True)
class Options:
    """What is to be proved; see the command line's help."""

    script: Path
    args: Sequence[str] = ()
    patched: Path | None = None
    root: Path | None = None
    start: Path | None = None
    link: Sequence[Path] = ()
    seed: int = 0
    steps: int | None = None
    kill: int = 0
    nproc: int = 1


def prove(options: Options, run: Runner | None = None) -> dict[str, Any]:
    """The verdict and what it stands on. Raises Unanswered, and OSError where a disk is full."""
    with tempfile.TemporaryDirectory(prefix="prove-", ignore_cleanup_errors=True) as work:
        bench = Bench(options, Path(work).resolve(), run or fresh_process)
        originals = [bench.run_original()]
        with ThreadPoolExecutor(bench.room_for(originals[0])) as pool:
            try:
                kills = pool.submit(bench.kills, len(originals[0].of("step")))
                patched = pool.submit(bench.run, "patched", bench.patched)
                originals.append(pool.submit(bench.run_original).result())
                runs = patched.result(), kills.result()
            finally:  # one run may have no answer, or it is Ctrl-C: the others are to end, too
                bench.stopping.set()
        bench.stopping.clear()
        report = compare(originals, *runs)
        if "differs" in verdicts(report):
            originals.append(bench.run_original("original, to be sure"))
            report = compare(originals, *runs)
        return report if options.kill else {k: v for k, v in report.items() if k != "resume"}


def verdicts(report: Mapping[str, Any]) -> set[str]:
    return {report["verdict"], report.get("resume", report)["verdict"]}


# --- The verdict ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """What a process did, and how it ended."""

    code: int
    output: str
    entries: Sequence[Entry]
    observed: Mapping[str, int]  # the drop-in's records by phase: an idle one proves nothing

    def of(self, *kinds: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind in kinds]

    @property
    def said(self) -> list[str]:
        """By the drop-in, but that it begins and ends."""
        said = re.findall(r"^observability: (?!(?:start|completed) at step).*", self.output, re.M)
        return said[:10]

    @property
    def failed_save(self) -> str:
        said = re.search(
            r"^observability: (.* was not saved.*|save\(\) failed.*)", self.output, re.M
        )
        return said[1] if said else ""

    @property
    def failure(self) -> str:
        if self.code == 0 or self.of("killed"):
            return ""
        lines = "\n".join(self.output.strip().splitlines()[-5:])
        return f"fails with status {self.code}, and these are its last lines:\n{lines}"

    @property
    def resumed(self) -> Entry | None:
        return next(iter(self.of("resume")), None)

    @property
    def afterwards(self) -> Sequence[Entry]:
        """Since it resumed, if it did."""
        return self.entries[self.entries.index(self.resumed) + 1 if self.resumed else 0 :]

    def check(self, script: Path) -> None:
        if self.code:
            raise Unanswered(f"the original {self.failure}")
        for entry in self.of("loss", "end"):
            if entry.bits.startswith(UNREADABLE):
                raise Unanswered(f"{script} has a tensor that cannot be read, {entry}")
        if not self.of("loss"):
            raise Unanswered(
                f"{script} back-propagated no loss in its own process; "
                "a process that it starts is not watched"
            )
        if not self.of("end"):
            raise Unanswered(f"{script} ends by os._exit, so that its weights cannot be compared")


def compare(
    originals: Sequence[Recording], patched: Recording, killed: Killed | None
) -> dict[str, Any]:
    first, masks = originals[0], Masks(originals)
    own = find(numbers_differ(first, other) for other in originals[1:])
    found = numbers_differ(first, patched)
    if not own:  # else what is said of these numbers differs too
        found = found or next(masks.differences(patched.entries), None)
    drift = max(itertools.starmap(drift_of, itertools.combinations(originals, 2)))
    theirs = min(drift_of(original, patched) for original in originals)
    within = own is not None and theirs <= SLACK * drift
    verdict = "identical" if not (own or found) else "within own drift" if within else "differs"
    verdict = "differs" if patched.code else verdict
    return {
        "verdict": verdict,
        "why": patched.failure,
        "counts": {kind: len(first.of(kind)) for kind in COMPARED} | masks.counts(),
        "first_difference": found,
        "own_difference": own,
        "own_line": masks.varies,
        "not_compared": masks.not_compared(),
        "drift": {"original": drift, "patched": theirs} if own else None,
        "observed": patched.observed,
        "said": patched.said,
        "resume": resume(killed, originals, masks, verdict),
    }


def numbers_differ(one: Recording, other: Recording) -> Difference | None:
    return first_difference(one.of(*COMPARED), other.of(*COMPARED))


def first_difference(ours: Sequence[Entry], theirs: Sequence[Entry]) -> Difference | None:
    for one, other in itertools.zip_longest(ours, theirs):
        if one is None or other is None or not one.same(other):
            return difference(one, other)
    return None


def difference(one: Entry | None, other: Entry | None) -> Difference:
    there = one or other
    assert there is not None
    sides = {"original": str(one or "nothing there"), "patched": str(other or "nothing there")}
    return {"step": there.step, "kind": there.kind, "place": there.place, **sides}


def find(found: Iterable[T]) -> T | None:
    return next(filter(None, found), None)


def drift_of(one: Recording, other: Recording) -> float:
    """The mean distance of two losses or values at one place in their order: of few runs it says
    more than the largest, which one spike decides."""
    kinds = [zip(one.of(kind), other.of(kind), strict=False) for kind in ("loss", "value")]
    pairs = [*itertools.chain(*kinds)]
    apart = [abs((a.value or 0.0) - (b.value or 0.0)) for a, b in pairs if a.bits != b.bits]
    mean = math.fsum(apart) / max(1, len(pairs))
    return mean if math.isfinite(mean) else sys.float_info.max  # JSON has no infinity


# --- What the script says -------------------------------------------------------------------------

CLOCK = re.compile(
    r"\d+(?::\d\d)+(?:[.,]\d+)?|\d{4}-\d\d-\d\d"
    r"|\b(?:time|took|elapsed|duration)\W{1,3}\d[\d.]*(?:e[+-]?\d+)?"
    r"|(?:\d+[dhms] ?)*\d[\d.]*(?:e[+-]?\d+)?[kmg]? ?"
    r"(?:[mun]?s|secs?|seconds?|minutes?|h|hours?|\w*/s(?:ec\w*)?|s/\w+)\b",
    re.I,
)
PADDING = re.compile(r"(?<! ) +(?=[\0\v])|(?<=[\0\v]) +")  # of a number to its column's width
NUMBER = re.compile(r"0x[0-9a-f]+|-?\d+(?:\.\d*)?(?:e[+-]?\d+)?|\b-?(?:nan|inf)\b", re.I)

SAID = ("line", "process", "file")
PRINTED, BY_PROCESSES = "line ", "process "  # the names of what is in no file
Slot = tuple[str, int]  # by its name a file; of what is printed, how many entries came before it
Place = tuple[str, int, int]  # of a line: its slot, and how many lines came in it before


def transcript(
    entries: Sequence[Entry], since: tuple[int, int] = (0, 0), without: Collection[object] = ()
) -> dict[Place, Entry]:
    """What was printed and written, by its place; but for lines of some kinds."""
    slot, line = since
    lines: dict[Place, Entry] = {}
    within = Counter({(PRINTED, slot): line})
    for entry in entries:
        if entry.kind in COMPARED:
            slot += 1
        elif entry.kind in SAID:
            name = f"{entry.kind} {entry.place}"
            key = name, slot if name == PRINTED else 0
            if not without or (key[0], masked(entry.bits)) not in without:
                lines[key[0], key[1], within[key]] = entry
                within[key] += 1
    return lines


def masked(text: str, varying: Collection[int] | None = None) -> str:
    """Without clocks, and without some of its numbers, or any."""
    count = itertools.count()

    def shown(number: re.Match[str]) -> str:
        return "\0" if varying is None or next(count) in varying else number[0]

    return PADDING.sub("", NUMBER.sub(shown, CLOCK.sub("\v", text)))


class Masks:
    """What all runs of the original print and write alike; other runs are held against it."""

    def __init__(self, originals: Sequence[Recording]) -> None:
        first, *others = (transcript(run.entries) for run in originals)
        self.wandering = {kind for other in others for kind in wandering(first, other)}
        # A file of a new name may be what the next run of the original writes, too.
        self.names_vary = any(names(first) != names(other) for other in others)
        first, *others = (transcript(run.entries, (0, 0), self.wandering) for run in originals)
        self.lines = first
        self.free: set[Place] = set()  # lines that differ in words
        self.loose: dict[tuple[str, str], set[int]] = defaultdict(set)  # which numbers vary
        self.varies: Difference | None = None  # the first line that differs
        for other in others:
            self._loosen(other)
        self.unlike = {name for name, _ in self.wandering} | {name for name, _ in self.loose}
        self.unlike |= {place[0] for place in self.free}

    def _loosen(self, theirs: Mapping[Place, Entry]) -> None:
        for place in sorted(self.lines.keys() | theirs.keys()):
            one, other = self.lines.get(place), theirs.get(place)
            if one and other and one.bits == other.bits:
                continue
            self.varies = self.varies or difference(one, other)
            if not one or not other or masked(one.bits) != masked(other.bits):
                self.free.add(place)
            else:
                pairs = zip(numbers(one.bits), numbers(other.bits), strict=True)
                varying = {i for i, (a, b) in enumerate(pairs) if a != b}
                self.loose[place[0], masked(one.bits)] |= varying

    def without_varying(self, name: str, line: str) -> str:
        return masked(line, self.loose.get((name, masked(line)), ()))

    def same(self, name: str, one: Entry | None, other: Entry | None) -> bool:
        if one is None or other is None or one.bits == other.bits:
            return one is not None and other is not None
        return self.without_varying(name, one.bits) == self.without_varying(name, other.bits)

    def differences(
        self,
        entries: Sequence[Entry],
        kinds: Collection[str] = SAID,
        since: tuple[int, int] = (0, 0),
        through: float = math.inf,
    ) -> Iterator[Difference]:
        """The lines that are others, the printed ones first; a slot that was not left is open."""
        theirs = transcript(entries, since, self.wandering)
        # How many of the lines before were such as come by the clock is not known.
        begin = (since[0] + 1, 0) if since[1] and self.wandering else since
        places = (self.lines.keys() | theirs.keys()) - self.free
        for place in sorted(places, key=lambda place: (place[0] != PRINTED, place)):
            name, *at = place
            one, other = self.lines.get(place), theirs.get(place)
            beyond = name == PRINTED and not begin <= tuple(at) < (through, 0)
            new = one is None and (self.names_vary and name.startswith("file "))
            is_meant = name.partition(" ")[0] in kinds and not beyond and not new
            if is_meant and not self.same(name, one, other):
                yield difference(one, other)

    def counts(self) -> dict[str, int]:
        files, lines = names(self.lines), [place for place in self.lines if place[0] == PRINTED]
        return {"line": len(lines), "file": len(files - self.unlike)}

    def not_compared(self) -> dict[str, Any]:
        kinds = len(self.loose) + len(self.free) + len(self.wandering)
        files = [name.removeprefix("file ") for name in self.unlike if name.startswith("file ")]
        left = {"kinds of line, in part": kinds, "files": ", ".join(sorted(files))}
        return {name: what for name, what in left.items() if what}


def names(lines: Mapping[Place, Entry]) -> set[str]:
    return {name for name, *_ in lines if name.startswith("file ")}


def wandering(ours: Mapping[Place, Entry], theirs: Mapping[Place, Entry]) -> set[tuple[str, str]]:
    """Kinds of line that come by the clock: of which one run has more in a slot than another."""
    sizes = [Counter(place[:2] for place in lines) for lines in (ours, theirs)]
    uneven = {slot for slot in sizes[0] | sizes[1] if sizes[0][slot] != sizes[1][slot]}
    one, other = (
        Counter((p[:2], masked(entry.bits)) for p, entry in lines.items() if p[:2] in uneven)
        for lines in (ours, theirs)
    )
    return {(slot[0], kind) for slot, kind in (one - other) + (other - one)}


def numbers(text: str) -> list[str]:
    return NUMBER.findall(CLOCK.sub("", text))


# --- Kills ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Killed:
    """The patched script killed again and again, beside an uninterrupted run that saves as it."""

    save_interval: int
    whole: Recording
    parts: list[Recording] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # what each part was killed in

    @property
    def last(self) -> Recording:
        return self.parts[-1] if self.parts else self.whole

    def runs(self) -> Iterator[dict[str, Any]]:
        for part, where in zip(self.parts, self.where, strict=True):
            counted = [entry for entry in part.afterwards if entry.kind in COUNTED]
            killed = counted[-1].step if part.of("killed") and counted else None
            resumed = part.resumed.step if part.resumed else None
            here = {"resumed_at": resumed, "killed_at": killed}
            yield {**here, "where": where} if where else here


def can_resume(patched: bytes) -> bool:
    rows = split_lines(patched)
    added = b"".join(rows[number - 1] for number in marked_numbers(patched))
    return b".resume(" in added or b".skip_epoch(" in added


def resume(
    killed: Killed | None, originals: Sequence[Recording], masks: Masks, verdict: str
) -> dict[str, Any]:
    """The verdict about resume, where there is one without a kill."""
    if killed is None or verdict != "identical":
        never = "the patch never calls resume() or skip_epoch()"
        why = f"without a kill the verdict is: {verdict}" if killed else never
        return {"verdict": "unanswered", "why": why}
    whole, runs = killed.whole, (killed.whole, *killed.parts)
    alone = numbers_differ(originals[0], whole) or next(masks.differences(whole.entries), None)
    # All numbers before any line: that a folder has the next number is no cause.
    parts = [part_differs(whole, part, masks) for part in killed.parts]
    apart = find(one for one, _ in parts) or find(one for _, one in parts)
    others, appended = files_differ(killed, masks)
    found = alone or apart or others or processes_differ(killed, masks)
    broken, failed = find(run.failure for run in runs), find(run.failed_save for run in runs)
    why = failed or broken or ("saving alone changes the run" if alone else "")
    answer = "differs" if broken or found else "identical"
    if answer == "identical" and not any(part.resumed for part in killed.parts):
        answer, why = "unanswered", why or "no kill left a checkpoint to resume from"
    return {
        "verdict": answer,
        "why": why or "",
        "first_difference": found,
        "runs": [*killed.runs()],
        "save_interval": killed.save_interval,
        "files_not_compared": ", ".join(appended),
        "said": whole.said,
    }


def part_differs(
    whole: Recording, part: Recording, masks: Masks
) -> tuple[Difference | None, Difference | None]:
    """The first number and the first line that are others, from where the process resumed."""
    ours, mark = whole.of(*COUNTED), part.resumed
    theirs = [entry for entry in part.afterwards if entry.kind in COUNTED]
    at = int(mark.bits) if mark else 0
    slot = sum(entry.kind in COMPARED for entry in ours[:at])
    through = slot + sum(entry.kind in COMPARED for entry in theirs)
    ours = ours[at : at + len(theirs)] if part.of("killed") else ours[at:]
    since = slot, int(mark.value or 0) if mark else 0
    lines = masks.differences(
        part.afterwards, ("line",), since, through if part.of("killed") else math.inf
    )
    return first_difference(ours, theirs), next(lines, None)


def files_differ(killed: Killed, masks: Masks) -> tuple[Difference | None, list[str]]:
    """And which files hold lines twice with good reason, or no more than what came last: those that
    are appended to, or that a process opened before it resumed and not again."""
    last, opened = killed.last, [entry for part in killed.parts for entry in part.of("open")]
    names = {entry.place for entry in opened if entry.bits == "part"}
    if last.resumed:
        late = {entry.place for entry in last.afterwards if entry.kind == "open"}
        names |= {entry.place for entry in last.of("open")} - late
    found = [] if last.of("killed") else [*masks.differences(last.entries, ("file",))]
    others = (each for each in found if each["place"] not in names)
    return next(others, None), sorted({each["place"] for each in found} & names)


def processes_differ(killed: Killed, masks: Masks) -> Difference | None:
    """What other processes print has no place: killed runs are to print no other lines, and all."""
    name = BY_PROCESSES
    if any(place[0] == name for place in masks.free) or not killed.parts:
        return None
    ours = [entry for place, entry in masks.lines.items() if place[0] == name]
    theirs = itertools.chain.from_iterable(part.of("process") for part in killed.parts)
    one, other = (
        {masks.without_varying(name, entry.bits): entry for entry in entries}
        for entries in (ours, theirs)
    )
    other = {k: e for k, e in other.items() if (name, masked(e.bits)) not in masks.wandering}
    odd = sorted(one.keys() ^ other.keys())
    return difference(one.get(odd[0]), other.get(odd[0])) if odd else None


AFTER_SAVE = "right after a save"
EVALUATION, LAST_OF_EPOCH = "in an evaluation", "at an epoch's last step"


def kill_points(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """Where a kill can tell something: how many entries are through by then, by what it is in."""
    counted = [*enumerate((entry for entry in entries if entry.kind in COUNTED), 1)]
    at = [(count, entry.place) for count, entry in counted if entry.kind == "at"]
    trained = [0, *(count for count, entry in counted if entry.kind != "value")]
    saves, evaluated = (
        [int(entry.bits) for entry in entries if entry.kind == kind] for kind in ("save", "eval")
    )
    begun = (trained[bisect(trained, last) - 1] + 1 for last in evaluated)
    evaluating = [*itertools.chain(*(map(range, begun, (last + 1 for last in evaluated))))]
    ends = [count for (count, epoch), (_, later) in itertools.pairwise(at) if epoch != later]
    points = {AFTER_SAVE: saves, EVALUATION: evaluating, LAST_OF_EPOCH: ends}
    points["at the last step"] = [count for count, _ in at[-1:]]
    steps = {count for count, _ in at}
    others = steps.union(*points.values())
    points["in an epoch"] = [count for count, _ in counted if count not in others]
    # From the first checkpoint to the last step or evaluation: what has completed is not resumed.
    span = range(min(saves, default=0), max(steps.union(evaluating), default=-1) + 1)
    return {name: [point for point in taken if point in span] for name, taken in points.items()}


def choose(
    points: Mapping[str, list[int]], kills: int, draw: random.Random
) -> list[tuple[int, str]]:
    """One of each kind, then another of each."""
    left = {name: draw.sample(each, len(each)) for name, each in points.items()}
    chosen: dict[int, str] = {}
    while len(chosen) < kills and any(left.values()):
        for name in draw.sample(sorted(left), len(left)):
            if left[name] and len(chosen) < kills:
                chosen.setdefault(left[name].pop(), name)
    return sorted(chosen.items())


# --- A copy of the script's folder ----------------------------------------------------------------

BLOCK = 1 << 20  # bytes of a file that are compared at once


class Copy:
    """A fresh copy of the script's folder, in a folder of its own, and what a run wrote there."""

    def __init__(self, options: Options, project: Project, home: Path, source: bytes) -> None:
        self.home, self.source = home, source
        self.folder = home / project.root.name
        self.script, self.start = self.folder / project.script, self.folder / project.start
        self.is_patched = source != project.original
        links = {(project.root / link): self.folder / link for link in project.links}

        def left_out(folder: str, names: Sequence[str]) -> set[str]:
            return {name for name in names if name in NOT_COPIED or Path(folder, name) in links}

        if home.is_relative_to(project.root):  # a copy would hold itself, until the disk is full
            raise Unanswered(
                f"{project.root} is to be copied, and the copies lie in it, in {home}; give the "
                f"script a folder of its own (see --root), or set TMPDIR to another one"
            )
        shutil.copytree(project.root, self.folder, symlinks=True, ignore=left_out)
        for there, here in links.items():
            here.symlink_to(there)
        self.script.write_bytes(source)
        if self.is_patched:
            own = (options.patched or options.script).with_name("observability.py")
            shutil.copyfile(own if own.exists() else DROP_IN, self.script.with_name(own.name))
        self.placed = self._files()

    def _files(self) -> dict[Path, tuple[int, int]]:
        """And when each was written, and its size."""
        walked = os.walk(self.home)
        paths = (Path(folder, name) for folder, _, names in walked for name in names)
        kept = (path for path in paths if path.suffix != ".pyc" and not path.is_symlink())
        found = {path: path.stat() for path in kept if path.is_file()}
        return {path: (each.st_mtime_ns, each.st_size) for path, each in found.items()}

    def written(self, opened: Collection[str]) -> Iterator[Entry]:
        """The lines of the files that are new, were written to or deleted since the copy was made,
        and of those outside the folder that were opened to be written."""
        now = self._files()
        changed = {path for path, _ in now.items() - self.placed.items()}
        elsewhere = {Path(name) for name in opened if name.startswith(os.sep)}
        changed |= {path for path in elsewhere if path.is_file()}
        for path in sorted(changed - {self.script}):
            if not (self.is_patched and is_the_drop_ins(path)):
                yield from self._lines(path)
        for path in sorted(self.placed.keys() - now.keys()):
            yield Entry("file", 0, "deleted", None, self.name(path))

    def _lines(self, path: Path) -> Iterator[Entry]:
        for line in held_in(path) or self._read(path):
            yield Entry("file", 0, self.tidy(line), None, self.name(path))

    def _read(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            yield ""  # shows that the file is there
            for block in iter(lambda: file.read(BLOCK), b""):
                yield from self._text(block)

    def _text(self, block: bytes) -> Sequence[str]:
        """Its lines; of what is no text a digest."""
        if block == self.source:
            return ["the script"]  # which the patch has changed
        if b"\0" not in block:
            with contextlib.suppress(UnicodeDecodeError):
                return block.decode().split("\n")
        return [f"bits {shortened(block.replace(bytes(self.folder), b''))}"]

    def name(self, path: Path | str) -> str:
        """From the script's folder; of what is elsewhere the whole path."""
        inside = Path(path).is_relative_to(self.home)
        return os.path.relpath(path, self.folder) if inside else str(path)

    def tidy(self, text: str) -> str:
        """Without the folder's own place and the script's lines, which the patch has moved."""
        name = re.escape(self.script.name)
        text = re.sub(rf"({name}\W{{1,3}}(?:line )?)\d+", r"\1#", text)
        return text.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), "")


def is_the_drop_ins(path: Path) -> bool:
    """In one of its runs or checkpoints, or beside these."""
    manifest = "run_manifest.json"
    within = any((folder / manifest).exists() for folder in path.parents)
    beside = path.name.startswith(("latest", ".launch-")) and any(path.parent.glob(f"*/{manifest}"))
    return within or beside or (path.suffix == ".obs" and "tfevents" in path.name)


# --- What a pickle holds --------------------------------------------------------------------------


class Inert(dict[Any, Any]):
    """Stands for whatever a pickle would call or make: nothing of a stranger's is run."""

    def __new__(cls, *args: Any) -> Inert:
        made = super().__new__(cls)
        made["made of"] = args
        return made

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self["state"] = state

    def append(self, item: Any) -> None:
        self[len(self)] = item


class Reader(pickle.Unpickler):
    """Reads a pickle without its classes, and of a tensor's storage the digest."""

    def __init__(self, file: IO[bytes], storage: Callable[[str], bytes] | None = None) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        return type(f"{module}.{name}", (Inert,), {})

    def persistent_load(self, found: Any) -> Any:
        kind, of, key, *place = found
        assert self._storage, "it lies elsewhere"
        return kind, of, shortened(self._storage(key)), *place


def held_in(path: Path) -> list[str]:
    """What torch.save or pickle wrote there, a line for each value by its path: which objects are
    one, and in which order keys came, is not of it. Of another file, nothing."""
    # A stranger's file need not be what it looks like, and may hold itself.
    with contextlib.suppress(Exception), path.open("rb") as file:
        begin = file.read(2)
        file.seek(0)
        if begin == b"PK":
            return [*held_in_zip(zipfile.ZipFile(file))]
        found = [*held(Reader(file).load())] if begin[:1] == b"\x80" else []
        return [] if file.read(1) else found
    return []


def held_in_zip(archive: zipfile.ZipFile) -> Iterator[str]:
    """By torch.save: the number that it makes of all bytes is left out."""
    root = archive.namelist()[0].partition("/")[0]
    with archive.open(f"{root}/data.pkl") as file:
        yield from held(Reader(file, lambda key: archive.read(f"{root}/data/{key}")).load())
    for name in archive.namelist():
        if not name.startswith((f"{root}/data", f"{root}/.data/serialization_id")):
            yield f"{name} {shortened(archive.read(name))}"


def held(what: Any, path: str = "") -> Iterator[str]:
    if not isinstance(what, dict | list | tuple | set | frozenset):
        exact = shortened(bytes(what)) if isinstance(what, bytes | bytearray) else repr(what)
        yield f"{path} {type(what).__name__} {exact}"
        return
    yield f"{path} {type(what).__name__} of {len(what)}"
    items = what.items() if isinstance(what, dict) else enumerate(what)
    if isinstance(what, set | frozenset):
        items = enumerate(sorted(what, key=repr))
    elif isinstance(what, dict) and "_hooks" in path.rpartition("[")[2]:
        items = enumerate(what.values())  # its key counts all hooks of the process, ours among them
    for key, item in sorted(items, key=lambda pair: repr(pair[0])):
        yield from held(item, f"{path}[{key!r}]")


# --- The runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Project:
    """What is copied, and the script in it as it was and as it is patched."""

    root: Path
    script: Path  # from there, as are the others
    start: Path
    links: Sequence[Path]
    original: bytes
    patched: bytes  # the original, where autopatch.py has yet to patch it


def read_project(options: Options) -> Project:
    root = (options.root or options.script.parent).resolve()
    paths = options.script, options.start or root, *options.link
    try:
        script, start, *links = (path.resolve(strict=True).relative_to(root) for path in paths)
        given = options.script.read_bytes()
        patched = options.patched.read_bytes() if options.patched else given
        original = reverse(given, options.script.name)
    except (OSError, ValueError, PatchError) as error:
        raise Unanswered(f"cannot read the script: {error}") from error
    return Project(root, script, start, links, original, patched)


class Bench:
    """Runs the scripts, each in a fresh copy of the folder, and notes what they do."""

    def __init__(self, options: Options, work: Path, run: Runner) -> None:
        self.options, self.work, self._run = options, work, run
        self.count = itertools.count(1)
        self.stopping = threading.Event()
        self.progress = Progress(5 if options.kill else 3)
        self.project = read_project(options)
        self.original, self.patched = self.project.original, self.project.patched
        if self.patched == self.original:
            self.patched = self._patch()

    def room_for(self, original: Recording) -> int:
        """How many runs there is room for at once: a GPU's memory is all a script's, and files
        outside of the folder and a port that it names are the same for all."""
        gpu = any(entry.place.startswith("random cuda") for entry in original.of("end"))
        outside = any(entry.place.startswith(os.sep) for entry in original.of("file"))
        return (
            1
            if gpu or outside or original.of("group") or self.options.nproc > 1
            else min(2, os.cpu_count() or 1)
        )

    def _copy(self, source: bytes) -> Copy:
        return Copy(self.options, self.project, self.work / f"{next(self.count):02}", source)

    def _patch(self) -> bytes:
        script = self._copy(self.original).script
        done = subprocess.run(
            [sys.executable, HERE / "autopatch.py", "--write", script],
            capture_output=True,
            text=True,
        )
        result = script.read_bytes()
        if done.returncode or result == self.original:
            said = (done.stderr or done.stdout).replace(f"{script.parent}{os.sep}", "")
            raise Unanswered(f"autopatch.py cannot patch it: {said.strip()}")
        return result

    def run_original(self, name: str = "original") -> Recording:
        recording = self.run(name, self.original)
        recording.check(self.options.script)
        return recording

    def kills(self, steps: int) -> Killed | None:
        """An uninterrupted run that saves, and one that is killed where that can tell something."""
        if not self.options.kill or not can_resume(self.patched):
            return None
        draw = random.Random(self.options.seed)
        every = min(draw.choice((1, 2, 3)), max(1, steps // 3))  # a step after a save is left
        whole = self.run("saving", self.patched, save_interval=every, settled=True)
        if whole.failure:
            return Killed(every, whole)
        points = choose(kill_points(whole.entries), self.options.kill, draw)
        killed, copy = Killed(every, whole), self._copy(self.patched)
        for number, (point, where) in enumerate([*points, (None, "")]):
            part = self._run_in(
                copy,
                f"kill {number + 1}, {where}" if point else "to the end",
                share=1.0 / (len(points) + 1),
                save_interval=every,
                kill_after=point,
                settled=number % 2 == 0 or where == AFTER_SAVE,
            )
            killed.parts.append(part)
            killed.where.append(where)
            if not part.of("killed"):
                break
        return killed

    def run(self, name: str, source: bytes, **more: Any) -> Recording:
        copy = self._copy(source)
        try:
            return self._run_in(copy, name, **more)
        finally:
            shutil.rmtree(copy.home, ignore_errors=True)

    def _run_in(self, copy: Copy, name: str, share: float = 1.0, **more: Any) -> Recording:
        number = next(self.count)
        record = self.work / f"{number}.jsonl"
        asked = {name: getattr(self.options, name) for name in ("args", "seed", "steps", "nproc")}
        job = Job(str(copy.script), str(copy.start), record=str(record), **asked, **more)

        def tick() -> None:
            if self.stopping.is_set():
                raise Unanswered("it was interrupted")
            self.progress.show(number, record, share)

        self.progress.begin(number, name)
        code = self._run(job, tick)
        self.progress.end(number, record, share)
        return recorded(copy, job, code)


def recorded(copy: Copy, job: Job, code: int) -> Recording:
    files = [Path(f"{job.record}.{name}") for name in ("out", "err")]
    # As bytes: a text file would begin a line at each \r.
    logs = [copy.tidy(file.read_bytes().decode("utf-8", "replace")) for file in files]
    output = "".join(logs)
    if os.strerror(errno.ENOSPC) in output:
        raise Unanswered(f"a disk is full; copies are made in {tempfile.gettempdir()}, or TMPDIR")
    entries = read_entries(copy, Path(job.record))
    entries += by_processes(logs, entries) if job.nproc == 1 else ()
    for rank in range(1, job.nproc):
        for entry in read_entries(copy, Path(f"{job.record}.{rank}")):
            if entry.kind == "end":
                entries.append(entry._replace(place=f"rank {rank} {entry.place}"))
    if any(entry.kind == "killed" for entry in entries):  # a journal's last line may be torn
        return Recording(code, output, entries, {})
    opened = {entry.place for entry in entries if entry.kind == "open"}
    journals = copy.home.rglob("metrics.ndjson")
    phases = Counter(line["tags"]["phase"] for path in journals for line in read_lines(path))
    return Recording(code, output, [*entries, *copy.written(opened)], dict(sorted(phases.items())))


def read_entries(copy: Copy, path: Path) -> list[Entry]:
    entries = [Entry(*fields) for fields in read_lines(path)] if path.exists() else []
    for number, entry in enumerate(entries):
        if entry.kind == "open":
            entries[number] = entry._replace(place=copy.name(entry.place))
        elif entry.kind in ("line", "aside"):
            entries[number] = entry._replace(bits=copy.tidy(entry.bits))
    return entries


def by_processes(logs: Sequence[str], entries: Sequence[Entry]) -> Iterator[Entry]:
    """The lines that were printed and not heard: by other processes, or past Python's streams."""
    heard = Counter(entry.bits for entry in entries if entry.kind in ("line", "aside"))
    lines = itertools.chain.from_iterable(log.split("\n")[:-1] for log in logs)
    others = Counter(filter(None, map(seen, lines))) - heard
    # What a resumed process prints at first may end a line that another began.
    ended = tuple(heard) if any(entry.kind == "resume" for entry in entries) else ()
    for line in sorted(others.elements()):
        if not any(whole.endswith(line) for whole in ended):
            yield Entry("process", 0, line)


class Progress:
    """A line on the terminal, drawn anew, with the time left; elsewhere a line for each run."""

    def __init__(self, planned: float) -> None:
        self.planned, self.done = planned, 0.0  # in whole runs
        self.began = time.monotonic()
        self.size = 0  # of a whole run's record
        self.under_way: dict[int, tuple[str, float]] = {}

    def begin(self, number: int, name: str) -> None:
        self.under_way[number] = name, 0.0
        if not sys.stderr.isatty():
            tell(f"run {name}")

    def show(self, number: int, record: Path, share: float) -> None:
        if sys.stderr.isatty():
            size = record.stat().st_size if record.exists() else 0
            name, _ = self.under_way[number]
            self.under_way[number] = name, min(share, size / self.size) if self.size else 0.0
            tell(self.line(time.monotonic()).ljust(99)[:99], end="\r")

    def end(self, number: int, record: Path, share: float) -> None:
        self.size = self.size or (record.stat().st_size if record.exists() else 0)
        self.show(number, record, share)
        del self.under_way[number]
        self.done += share

    def line(self, now: float) -> str:
        runs = [*self.under_way.values()]
        through = min(0.99, (self.done + sum(part for _, part in runs)) / self.planned)
        spent = now - self.began
        left = f"{spent / through - spent:.0f} s left" if self.size else "the first run"
        names = " and ".join(name for name, _ in runs)
        return f"[{'#' * round(20 * through):20}] {left}, run {names}"


def fresh_process(job: Job, tick: Callable[[], None]) -> int:
    """A Python of its own, in the user's environment; what it starts ends with it."""
    asked = Path(job.record).with_suffix(".job")
    asked.write_text(json.dumps(asdict(job)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.nproc}"]
    launcher = torchrun if job.nproc > 1 else []
    with open(f"{job.record}.out", "wb") as out, open(f"{job.record}.err", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, *launcher, HERE / "recorder.py", asked],
            cwd=job.folder,
            env=environment(job),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            tick()
        return process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(job: Job) -> dict[str, str]:
    # A drop-in that is turned off proves nothing; sets of strings differ in order by the hash seed.
    given = {k: v for k, v in os.environ.items() if k not in ("OBS_DISABLE", "OBS_RESUME")}
    ours = {"PYTHONHASHSEED": str(job.seed % 2**32), "OBS_PLOT_INTERVAL": "0", **given}
    ours["MASTER_PORT"] = str(free_port())  # another run, or what began us, may hold the one given
    saves = {"OBS_RESUME": "auto", "SAVE_INTERVAL": str(job.save_interval)}
    return ours | (saves if job.save_interval else {})


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def read_lines(path: Path) -> Iterator[Any]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def tell(text: str, end: str = "\n") -> None:
    print(f"prove: {text}{end}", end="", file=sys.stderr, flush=True)  # whole, of two threads


# --- Command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    asked = vars(_parser().parse_args(given[:cut]))
    as_json = asked.pop("json")
    try:
        report = prove(Options(**asked, args=given[cut + 1 :]))
    except (Unanswered, OSError) as error:  # a disk that is full, a folder that cannot be copied
        report = {"verdict": "unanswered", "why": str(error)[:1000]}
    except KeyboardInterrupt:
        report = {"verdict": "unanswered", "why": "it was interrupted"}
    if sys.stderr.isatty():  # the bar stays
        print(file=sys.stderr)
    report = {"script": str(asked["script"]), **report}
    print(json.dumps(report, indent=2) if as_json else "\n".join(sentences(report)))
    found = verdicts(report)
    return 1 if "differs" in found else 2 if "unanswered" in found else 0


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] TRAIN.PY [-- ARGS]",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="exit status: 0 identical, 1 it differs, 2 no answer",
    )
    add = parser.add_argument
    path: dict[str, Any] = {"type": Path, "metavar": "PATH"}
    number: dict[str, Any] = {"type": at_least_one, "metavar": "N"}
    add("script", type=Path, metavar="TRAIN.PY", help="the training script; its ARGS follow --")
    add("--patched", **path, help="the patched script, in place of autopatch's")
    add("--root", **path, help="folder to copy and to start in; by default the script's")
    add("--start", **path, help="folder within it to start in instead")
    add("--link", **path, action="append", default=[], help="large data in it: linked, not copied")
    add("--seed", type=int, default=0, help="of python, numpy and torch, before the script's own")
    add("--steps", **number, help="end each run after N optimizer steps")
    add("--kill", **number, default=0, help="prove resume too, with N kills")
    add(
        "--nproc", **number, default=1, help="under torchrun; rank 0 is compared, of others the end"
    )
    add("--json", action="store_true", help="print the report as JSON")
    return parser


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each fact, those within another indented."""
    yield f"{report['script']}: {report['verdict']}"
    yield from _facts({name: report[name] for name in report if name not in ("script", "verdict")})


def _facts(facts: Mapping[str, Any], indent: str = "  ") -> Iterator[str]:
    for key, fact in facts.items():
        name = f"{indent}{key.replace('_', ' ')}"
        for item in fact if isinstance(fact, list) else [fact] if fact else []:
            if not isinstance(item, dict):
                yield f"{name}: {shown(item)}"
            elif "verdict" in item:
                yield ": ".join(filter(None, (name, item["verdict"], item["why"])))
                yield from _facts({k: item[k] for k in item if k not in ("verdict", "why")}, "    ")
            else:
                yield f"{name}: {', '.join(f'{key} {shown(each)}' for key, each in item.items())}"


def shown(fact: Any) -> str:
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)


if __name__ == "__main__":
    sys.exit(main())
