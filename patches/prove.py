"""Prove that a patched training script computes and says what the original does, to the last bit.

    python prove.py train.py -- ARGS              the original and the patched script, both twice
    python prove.py train.py --steps 50 -- ARGS   the first 50 optimizer steps of each
    python prove.py train.py --kill 3 -- ARGS     and that a killed run comes to the same end
    python prove.py train.py --nproc 2 -- ARGS    as torchrun starts it, with two processes
    python prove.py train.py --patched mine.py    another patch than the one autopatch.py makes

Each run is a process of its own in a fresh copy of the script's folder, with the same seed. Noted
are the bits of every loss that is back-propagated, every float that the script reads off a tensor
(validation losses are among them), every optimizer step, and at the end all parameters, buffers,
optimizer states and random generators; every line that is printed, and every file that is written
in the folder. What two runs of the original print or write differently is masked: of a line the
numbers that vary, clocks and speeds at once. Not compared are progress bars, warnings, and what
other threads and processes print. An original whose numbers differ from run to run is said to,
and the verdict is then about how far it drifts. Processes that the script starts are not watched.

Exit status: 0 identical, or within the script's own drift; 1 it differs; 2 no answer, and why.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lines import PatchError, marked_numbers, reverse, split_lines
from recorder import ASIDE, COMPARED, UNREADABLE, Entry, Job

__all__ = ["Options", "Unanswered", "main", "prove"]

HERE = Path(__file__).resolve().parent
DROP_IN = HERE.parent / "mainrun" / "observability.py"
SLACK = 2.0  # times the script's own drift, known from few samples, that the patched one may have
NOT_COPIED = {".git", ".venv", "venv", "node_modules", "__pycache__", "wandb", "runs", "out"}

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
    pairs: int = 2
    nproc: int = 1


def prove(options: Options, run: Runner | None = None) -> dict[str, Any]:
    """The verdict and what it stands on. Raises Unanswered."""
    with tempfile.TemporaryDirectory(prefix="prove-", ignore_cleanup_errors=True) as work:
        bench = Bench(options, Path(work), run or fresh_process)
        originals = [bench.run("original", bench.original)]
        originals[0].check(options.script)
        patched = [bench.run("patched", bench.patched)]
        kills = Kills(bench, originals[0]) if options.kill else None

        def run_others(bench: Bench) -> None:
            """Of originals two at least: what these do not share is masked."""
            for number in range(1, max(2, options.pairs)):
                originals.append(bench.run("original", bench.original))
                originals[-1].check(options.script)
                if number < options.pairs:
                    patched.append(bench.run("patched", bench.patched))

        same = not patched[0].code and not numbers_differ(originals[0], patched[0])
        if kills and same and not kills.obstacle and bench.has_room_for_two(originals[0]):
            bench.side_by_side(kills.run, run_others)
        elif not patched[0].code:
            run_others(bench)
        report = compare(originals, patched)
        if (report["first_difference"] or {}).get("kind") in ("line", "file"):
            originals.append(bench.run("original, to be sure", bench.original))
            report = compare(originals, patched)
        if kills:
            report["resume"] = kills.prove(report["verdict"], Masks(originals))
        return report


# --- The verdict ----------------------------------------------------------------------------------


@dataclass
class Recording:
    """What a process did, and how it ended."""

    code: int
    output: str
    entries: list[Entry]
    observed: dict[str, int]  # the drop-in's records by phase: to prove an idle one is no proof
    files: dict[str, str] = field(default_factory=dict)  # digests of what was written, by path
    alone: bool = True  # no other run beside it: its times are worth something

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
        lines = "\n".join(self.output.strip().splitlines()[-5:])
        return f"it fails with status {self.code}, and these are its last lines:\n{lines}"

    @property
    def resumed(self) -> Entry | None:
        return next(iter(self.of("resume")), None)

    @property
    def afterwards(self) -> list[Entry]:
        """Since it resumed, if it did."""
        return self.entries[self.entries.index(self.resumed) + 1 if self.resumed else 0 :]

    def check(self, script: Path) -> None:
        if self.code:
            raise Unanswered(f"{script} is not patched yet: {self.failure}")
        for entry in self.of("loss", "end"):
            if entry.bits.startswith(UNREADABLE):
                raise Unanswered(
                    f"{script} has a tensor that cannot be read, {entry.kind} "
                    f"{entry.place}: {entry.bits}"
                )
        if not self.of("loss"):
            raise Unanswered(
                f"{script} back-propagated no loss in its own process; "
                "a process that it starts is not watched"
            )


def compare(originals: Sequence[Recording], patched: Sequence[Recording]) -> dict[str, Any]:
    first, theirs, masks = originals[0], patched[-1], Masks(originals)
    own = _first(numbers_differ(first, other) for other in originals[1:])
    found = _first(numbers_differ(first, other) for other in patched)
    if not own:  # else what is said of these numbers differs too
        found = found or _first(masks.difference(other) for other in patched)
    drift, their_drift = (
        max((drift_of(first, other) for other in runs), default=0.0)
        for runs in (originals, patched)
    )
    within = own is not None and their_drift <= SLACK * drift
    verdict = "identical" if not (own or found) else "within own drift" if within else "differs"
    counts = {kind: len(first.of(kind)) for kind in ("step", "loss", "value", "end")}
    return {
        "verdict": "differs" if theirs.code else verdict,
        "why": theirs.failure if theirs.code else "",
        "counts": {**counts, "line": len(masks.lines), "file": len(masks.files)},
        "first_difference": found,
        "own_difference": own,
        **masks.report(),
        "drift": {"original": drift, "patched": their_drift} if own else None,
        "observed": theirs.observed,
        "said": theirs.said,
        "cost": {} if theirs.code else cost(originals, patched),
    }


def numbers_differ(one: Recording, other: Recording) -> Difference | None:
    return first_difference(one.of(*COMPARED), other.of(*COMPARED))


def first_difference(ours: Sequence[Entry], theirs: Sequence[Entry]) -> Difference | None:
    for one, other in zip_longest(ours, theirs):
        if one is None or other is None or one.key != other.key:
            return _difference(one, other)
    return None


def _difference(one: Entry | None, other: Entry | None) -> Difference:
    there = one or other
    assert there is not None
    sides = {"original": str(one or "nothing more"), "patched": str(other or "nothing more")}
    return {"step": there.step, "kind": there.kind, "place": there.place, **sides}


def _first(found: Iterator[Difference | None]) -> Difference | None:
    return next(filter(None, found), None)


def drift_of(one: Recording, other: Recording) -> float:
    """The mean distance of two losses or values at one place in their order: of few runs it says
    more than the largest, which one spike decides."""
    pairs = [
        *zip(one.of("loss"), other.of("loss"), strict=False),
        *zip(one.of("value"), other.of("value"), strict=False),
    ]
    apart = [abs((a.value or 0.0) - (b.value or 0.0)) for a, b in pairs if a.bits != b.bits]
    mean = math.fsum(apart) / max(1, len(pairs))
    return mean if math.isfinite(mean) else math.inf


def cost(originals: Sequence[Recording], patched: Sequence[Recording]) -> dict[str, Any]:
    """Medians over the runs: from the script's first line to its exit, and from step to step."""

    def medians(runs: Sequence[Recording]) -> Iterator[float]:
        alone = [times(run) for run in runs if run.alone]
        return map(statistics.median, zip(*alone, strict=True))

    rows = zip(
        ("wall_s", "cpu_s", "wall_ms_a_step", "cpu_ms_a_step"),
        medians(originals),
        medians(patched),
        strict=True,
    )
    return {name: {"original": ours, "patched": theirs} for name, ours, theirs in rows}


def times(run: Recording) -> tuple[float, ...]:
    steps = run.of("step") or run.of("loss")  # an update by hand has no step
    between = zip(steps[0].times, steps[-1].times, strict=True)
    each = [1e3 * (b - a) / max(1, len(steps) - 1) for a, b in between]
    return (*run.of("done")[-1].times, *each)


# --- What the script says -------------------------------------------------------------------------

CLOCK = re.compile(
    r"\d+(?::\d\d)+(?:[.,]\d+)?|\d{4}-\d\d-\d\d"
    r"|\b(?:time|took|elapsed|duration)\W{1,3}\d[\d.]*(?:e[+-]?\d+)?"
    r"|\d[\d.]*(?:e[+-]?\d+)? ?"
    r"(?:[mun]?s|secs?|seconds?|minutes?|h|hours?|\w*/s(?:ec\w*)?|s/\w+)\b",
    re.I,
)
NUMBER = re.compile(r"0x[0-9a-f]+|-?\d+(?:\.\d*)?(?:e[+-]?\d+)?|\b-?(?:nan|inf)\b", re.I)

Place = tuple[int, int]  # of a line: how many entries came before it, and how many lines since


def transcript(entries: Sequence[Entry], at: Place = (0, 0)) -> dict[Place, Entry]:
    """The printed lines by their place."""
    (slot, line), lines = at, {}
    for entry in entries:
        if entry.kind == "line":
            lines[slot, line] = entry
            line += 1
        elif entry.kind in COMPARED:
            slot, line = slot + 1, 0
    return lines


def template(text: str) -> str:
    return NUMBER.sub("#", CLOCK.sub("<time>", text))


def numbers(text: str) -> list[str]:
    return NUMBER.findall(CLOCK.sub("<time>", text))


class Masks:
    """What all runs of the original print and write alike; other runs are held against it."""

    def __init__(self, originals: Sequence[Recording]) -> None:
        first, *others = originals
        self.wandering: set[str] = set()  # templates of lines that come by the clock
        self.loose_slots: set[int] = set()  # between which entries some came
        for other in others:
            self._find_wandering(transcript(first.entries), transcript(other.entries))
        self.lines = self.settled(transcript(first.entries))
        self.free: set[Place] = set()  # lines that differ in words
        self.loose: dict[str, set[int]] = defaultdict(set)  # which numbers vary, by template
        self.varies: Difference | None = None  # the first line that differs
        for other in others:
            self._loosen(self.settled(transcript(other.entries)))
        names = {name for run in originals for name in run.files}
        digests = {name: {run.files.get(name, "missing") for run in originals} for name in names}
        self.files = {name: each.pop() for name, each in digests.items() if len(each) == 1}
        self.unlike = sorted(names - self.files.keys())

    def _find_wandering(self, ours: Mapping[Place, Entry], theirs: Mapping[Place, Entry]) -> None:
        counts: list[dict[int, Counter[str]]] = [defaultdict(Counter), defaultdict(Counter)]
        for count, lines in zip(counts, (ours, theirs), strict=True):
            for (slot, _), entry in lines.items():
                count[slot][template(entry.bits)] += 1
        for slot in counts[0].keys() | counts[1].keys():
            one, other = counts[0][slot], counts[1][slot]
            if one.total() != other.total():
                self.wandering |= {*(one - other), *(other - one)}
                self.loose_slots.add(slot)

    def settled(self, lines: Mapping[Place, Entry]) -> dict[Place, Entry]:
        """Without those that come by the clock, numbered anew."""
        if not self.wandering:
            return dict(lines)
        left: dict[Place, Entry] = {}
        gone: Counter[int] = Counter()
        for (slot, line), entry in lines.items():
            if template(entry.bits) in self.wandering:
                gone[slot] += 1
            else:
                left[slot, line - gone[slot]] = entry
        return left

    def _loosen(self, theirs: Mapping[Place, Entry]) -> None:
        for place in sorted(self.lines.keys() | theirs.keys()):
            one, other = self.lines.get(place), theirs.get(place)
            if one and other and one.bits == other.bits:
                continue
            self.varies = self.varies or _difference(one, other)
            if not one or not other or template(one.bits) != template(other.bits):
                self.free.add(place)
            else:
                pairs = zip(numbers(one.bits), numbers(other.bits), strict=True)
                self.loose[template(one.bits)] |= {i for i, (a, b) in enumerate(pairs) if a != b}

    def difference(self, run: Recording) -> Difference | None:
        return self.line_difference(transcript(run.entries)) or self.file_difference(run)

    def line_difference(
        self, theirs: Mapping[Place, Entry], since: Place = (0, 0), until: float = math.inf
    ) -> Difference | None:
        """The first line that is another, from a place on; a slot that was not left is open."""
        theirs = self.settled(theirs)
        for place in sorted(self.lines.keys() | theirs.keys()):
            one, other = self.lines.get(place), theirs.get(place)
            free = place in self.free or place[0] in self.loose_slots
            if free or place < since or place[0] >= until:
                continue
            if not (one and other and self.equal(one.bits, other.bits)):
                return _difference(one, other)
        return None

    def equal(self, ours: str, theirs: str) -> bool:
        kind = template(ours)
        if ours == theirs or kind != template(theirs):
            return ours == theirs
        loose, pairs = self.loose.get(kind, ()), zip(numbers(ours), numbers(theirs), strict=True)
        return all(one == other or i in loose for i, (one, other) in enumerate(pairs))

    def file_difference(self, run: Recording, but: Sequence[str] = ()) -> Difference | None:
        for name in sorted(self.files.keys() - set(but)):
            ours, theirs = self.files[name], run.files.get(name, "missing")
            if ours != theirs:
                return {"kind": "file", "place": name, "original": ours, "patched": theirs}
        return None

    def report(self) -> dict[str, Any]:
        masked = sum(map(bool, self.loose.values())) + len(self.free) + len(self.wandering)
        left = {"kinds of line, in part": masked, "files": ", ".join(self.unlike)}
        return {
            "own_line": self.varies,
            "not_compared": {name: what for name, what in left.items() if what},
        }


# --- Kills ----------------------------------------------------------------------------------------


class Kills:
    """The patched script killed again and again, beside an uninterrupted run that saves as it."""

    def __init__(self, bench: Bench, original: Recording) -> None:
        self.bench, self.original = bench, original
        self.draw = random.Random(bench.options.seed)
        self.every = self.draw.choice((1, 2, 3))
        self.whole: Recording | None = None
        self.parts: list[Recording] = []
        self.places: list[Place] = []  # from which on a part's lines are to be the original's
        self.runs: list[dict[str, Any]] = []
        self.found: Difference | None = None
        rows = split_lines(bench.patched)
        added = b"".join(rows[number - 1] for number in marked_numbers(bench.patched))
        can = b".resume(" in added or b".skip_epoch(" in added
        self.obstacle = "" if can else "the patch never calls resume() or skip_epoch()"

    def run(self, bench: Bench) -> None:
        """All processes, to the first that computes something else."""
        env = {"OBS_RESUME": "auto", "SAVE_INTERVAL": str(self.every)}
        self.whole = bench.run("saving", bench.patched, marks=True, settled=True, env=env)
        self.found = numbers_differ(self.original, self.whole)
        if self.whole.code or self.found:
            return
        points = choose(kill_points(self.whole.entries), bench.options.kill, self.draw)
        for number, (point, where) in enumerate([*points, (None, "")]):
            part = bench.run(
                f"kill {number + 1}, {where}" if point else "to the end",
                bench.patched,
                share=1.0 / (len(points) + 1),
                fresh=number == 0,
                marks=True,
                env=env,
                kill_after=point,
                settled=number % 2 == 0 or where == AFTER_SAVE,
            )
            self.parts.append(part)
            self.found = self.place(part, where)
            if self.found or part.code not in (0, -signal.SIGKILL):
                return

    def place(self, part: Recording, where: str) -> Difference | None:
        """Find where in the uninterrupted run a process began, and compare from there on."""
        assert self.whole is not None
        whole, mark = self.whole.of(*COMPARED, "at"), part.resumed
        entries = [each for each in part.afterwards if each.kind in (*COMPARED, "at")]
        at = int(mark.bits) if mark else 0
        slot = sum(entry.kind in COMPARED for entry in whole[:at])
        self.places.append((slot, int(mark.value or 0) if mark else 0))
        killed = entries[-1].step if part.code == -signal.SIGKILL and entries else None
        here = {"resumed_at": mark and mark.step, "killed_at": killed}
        self.runs.append({**here, "where": where} if where else here)
        return first_difference(
            whole[at:] if part.code == 0 else whole[at : at + len(entries)], entries
        )

    def prove(self, verdict: str, masks: Masks) -> dict[str, Any]:
        """The verdict about resume, where there is one without a kill."""
        if self.obstacle or verdict != "identical":
            why = self.obstacle or f"without a kill the verdict is: {verdict}"
            return {"verdict": "unanswered", "why": why}
        if self.whole is None:
            self.run(self.bench)
        assert self.whole is not None
        runs = [self.whole, *self.parts]
        failed = next((run.failed_save for run in runs if run.failed_save), "")
        broken = next((run.failure for run in runs if run.code not in (0, -signal.SIGKILL)), "")
        appended = self.written_in_part(masks)
        alone = masks.difference(self.whole) if self.parts else self.found
        found = self.found or alone or self.said_otherwise(masks, appended)
        if broken or found:
            verdict, why = "differs", "saving alone changes the run" if alone else ""
        elif any(run["resumed_at"] is not None for run in self.runs):
            verdict, why = "identical", ""
        else:
            verdict, why = "unanswered", "no kill left a checkpoint to resume from"
        return {
            "verdict": verdict,
            "why": failed or broken or why,
            "first_difference": found,
            "runs": self.runs,
            "save_interval": self.every,
            "files_not_compared": ", ".join(appended),
            "said": self.whole.said,
        }

    def said_otherwise(self, masks: Masks, appended: Sequence[str]) -> Difference | None:
        for part, since in zip(self.parts, self.places, strict=True):
            lines = transcript(part.afterwards, since)
            through = since[0] + sum(entry.kind in COMPARED for entry in part.afterwards)
            found = masks.line_difference(lines, since, math.inf if part.code == 0 else through)
            if found:
                return found
        ended = self.parts and self.parts[-1].code == 0
        return masks.file_difference(self.parts[-1], appended) if ended else None

    def written_in_part(self, masks: Masks) -> list[str]:
        """Files that hold lines twice with good reason, or no more than what came last: those that
        are appended to, or that a process opened before it resumed and not again."""
        opened = [entry for part in self.parts for entry in part.of("open")]
        names = {entry.place for entry in opened if entry.bits == "part"}
        last = self.parts[-1] if self.parts else None
        if last is not None and last.resumed is not None:
            late = {entry.place for entry in last.afterwards if entry.kind == "open"}
            names |= {entry.place for entry in last.of("open")} - late
        return sorted(
            name
            for name in names & masks.files.keys()
            if last and last.files.get(name) != masks.files[name]
        )


AFTER_SAVE = "right after a save"


def kill_points(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """Where a kill can tell something: how many entries are through by then, by what it is in."""
    points: dict[str, list[int]] = {
        name: []
        for name in (AFTER_SAVE, "in an evaluation", "at an epoch's last step", "at the last step")
    }
    count, trained, at, within = 0, 0, [], []
    for entry in entries:
        if entry.kind == "save":
            points[AFTER_SAVE].append(int(entry.bits))
        elif entry.kind == "eval":
            points["in an evaluation"] += range(trained + 1, int(entry.bits) + 1)
        elif entry.kind not in ASIDE:
            count += 1
            trained = trained if entry.kind == "value" else count
            if entry.kind == "at":
                at.append((count, entry.place))
            else:
                within.append(count)
    if not at:
        return {}
    points["at an epoch's last step"] += [
        count for (count, epoch), (_, following) in itertools.pairwise(at) if epoch != following
    ]
    points["at the last step"].append(at[-1][0])
    others = {point for taken in points.values() for point in taken}
    points["in an epoch"] = [point for point in within if point not in others]
    # From the first checkpoint to the last step or evaluation: what has completed is not resumed.
    last = max(at[-1][0], *points["in an evaluation"], 0)
    span = range(min(points[AFTER_SAVE], default=0), last + 1)
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


# --- The runs -------------------------------------------------------------------------------------


class Bench:
    """A folder in which each run finds a fresh copy of the script, at the same path."""

    def __init__(self, options: Options, work: Path, run: Runner) -> None:
        self.options, self.work, self._run = options, work, run
        self.folder = work / "1"
        self.alone = True
        self.count = itertools.count(1)
        self.stopping = threading.Event()
        self.placed: dict[str, tuple[int, int]] = {}  # what lay in the folder
        planned = max(2, options.pairs) + options.pairs + (2 if options.kill else 0)
        self.progress = Progress(planned)
        self.root = (options.root or options.script.parent).resolve()
        try:
            given = options.script.read_bytes()
            self._script = options.script.resolve().relative_to(self.root)
            self._start = (options.start or self.root).resolve().relative_to(self.root)
            self.original = reverse(given, options.script.name)
            self.patched = options.patched.read_bytes() if options.patched else given
        except (OSError, ValueError, PatchError) as error:
            raise Unanswered(f"cannot read the script: {error}") from error
        if self.patched == self.original:
            self.patched = self._patch()

    @property
    def script(self) -> Path:
        return self.folder / self._script

    def has_room_for_two(self, original: Recording) -> bool:
        """Of processors; and a GPU's memory is all a script's."""
        gpu = any(entry.place.startswith("random cuda") for entry in original.of("end"))
        return (os.cpu_count() or 1) > 1 and self.options.nproc == 1 and not gpu

    def side_by_side(self, one: Callable[[Bench], None], other: Callable[[Bench], None]) -> None:
        """Each in a folder of its own."""
        self.alone = False
        beside = copy.copy(self)
        beside.folder = self.work / "2"
        with ThreadPoolExecutor(1) as pool:
            try:
                ended = pool.submit(other, beside)
                one(self)
                ended.result()
            except BaseException:  # a run that has no answer, or Ctrl-C: the other is to end, too
                self.stopping.set()
                raise
            finally:
                self.alone = True

    def _patch(self) -> bytes:
        self._place(self.original)
        done = subprocess.run(
            [sys.executable, HERE / "autopatch.py", "--write", self.script],
            capture_output=True,
            text=True,
        )
        result = self.script.read_bytes()
        if done.returncode or result == self.original:
            said = (done.stderr or done.stdout).replace(f"{self.script.parent}{os.sep}", "")
            raise Unanswered(f"autopatch.py cannot patch it: {said.strip()}")
        return result

    def _place(self, source: bytes) -> None:
        links = [path.resolve() for path in self.options.link]

        def left_out(folder: str, names: Sequence[str]) -> set[str]:
            return {name for name in names if name in NOT_COPIED or Path(folder, name) in links}

        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.root, self.folder, symlinks=True, ignore=left_out)
        for link in links:
            (self.folder / link.relative_to(self.root)).symlink_to(link)
        self.script.write_bytes(source)
        if source != self.original:
            own = (self.options.patched or self.options.script).with_name("observability.py")
            shutil.copyfile(own if own.exists() else DROP_IN, self.script.with_name(own.name))
        self.placed = {name: stamp(path) for name, path in self._files()}

    def _files(self) -> Iterator[tuple[str, Path]]:
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names if not name.endswith(".pyc")):
                if path.is_file() and not path.is_symlink():
                    yield str(path.relative_to(self.folder)), path

    def run(
        self, name: str, source: bytes, *, fresh: bool = True, share: float = 1.0, **more: Any
    ) -> Recording:
        if fresh:
            self._place(source)
        number = next(self.count)
        self.progress.begin(number, name)
        result = self.work / f"{number}.jsonl"
        job = Job(
            str(self.script),
            str(self.folder / self._start),
            list(self.options.args),
            str(result),
            str(result.with_suffix(".log")),
            self.options.seed,
            self.options.steps,
            nproc=self.options.nproc,
            **more,
        )

        def tick() -> None:
            if self.stopping.is_set():
                raise Unanswered("it was interrupted")
            self.progress.show(number, result, share)

        code = self._run(job, tick)
        self.progress.end(number, result, share)
        output = self._tidy(Path(job.log).read_text("utf-8", "replace"))
        entries = list(self._entries(result)) if result.exists() else []
        if entries and entries[-1].kind == "killed":  # torchrun itself ends with 1
            code = -signal.SIGKILL
        for path in sorted(self.work.glob(f"{result.name}.*")):  # where the other ranks end
            rank = path.suffix.removeprefix(".")
            ends = (entry for entry in self._entries(path) if entry.kind == "end")
            entries += [entry._replace(place=f"rank {rank} {entry.place}") for entry in ends]
        if code < 0:  # a kill may leave a journal whose last line is torn
            return Recording(code, output, entries, {}, alone=self.alone)
        return Recording(code, output, entries, self._observed(), self._written(source), self.alone)

    def _tidy(self, text: str) -> str:
        """Without the folder's own place and the script's lines, which the patch has moved."""
        name = re.escape(self.script.name)
        text = re.sub(rf"({name}\W{{1,3}}(?:line )?)\d+", r"\1#", text)
        return text.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), "")

    def _entries(self, path: Path) -> Iterator[Entry]:
        for entry in (Entry(*fields) for fields in read_lines(path)):
            if entry.kind == "line":
                yield entry._replace(bits=self._tidy(entry.bits))
            elif entry.kind != "open":
                yield entry
            elif entry.place.startswith(f"{self.folder}{os.sep}"):
                yield entry._replace(place=os.path.relpath(entry.place, self.folder))

    def _written(self, source: bytes) -> dict[str, str]:
        """Digests of the files that are new or were written to since the copy was made."""
        return {
            name: digest(path, self.folder, source)
            for name, path in self._files()
            if path != self.script and self.placed.get(name) != stamp(path)
        }

    def _observed(self) -> dict[str, int]:
        journals = self.folder.rglob("metrics.ndjson")
        phases = [line["tags"]["phase"] for path in journals for line in read_lines(path)]
        return {phase: phases.count(phase) for phase in sorted(set(phases))}


def stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


SMALL = 1 << 24  # bytes that are read at once


def digest(path: Path, folder: Path, source: bytes) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(SMALL):
            if block == source:
                return "the script"  # which the patch has changed
            whole.update(block.replace(bytes(folder), b""))
    return whole.hexdigest()[:32]


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
            tell(f"run {number}: {name}")

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
        runs = dict(self.under_way)
        through = min(0.99, (self.done + sum(part for _, part in runs.values())) / self.planned)
        spent = now - self.began
        left = f"{spent / through - spent:.0f} s left" if self.size else "the first run"
        names = " and ".join(f"run {number}: {name}" for number, (name, _) in runs.items())
        return f"[{'#' * round(20 * through):20}] {left}, {names}"


def fresh_process(job: Job, tick: Callable[[], None]) -> int:
    """A Python of its own, in the user's environment; what it starts ends with it."""
    asked = Path(job.record).with_suffix(".job")
    asked.write_text(json.dumps(asdict(job)))
    # A drop-in that is turned off proves nothing; sets of strings differ in order by the hash seed.
    given = {k: v for k, v in os.environ.items() if k not in ("OBS_DISABLE", "OBS_RESUME")}
    env = {"PYTHONHASHSEED": str(job.seed % 2**32), "OBS_PLOT_INTERVAL": "0", **given, **job.env}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.nproc}"]
    launcher = torchrun if job.nproc > 1 else []
    with open(job.log, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher, HERE / "recorder.py", asked],
            cwd=job.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
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


def read_lines(path: Path) -> Iterator[Any]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def tell(text: str, end: str = "\n") -> None:
    print(f"prove: {text}", end=end, file=sys.stderr, flush=True)


# --- Command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    asked = vars(_parser().parse_args(given[:cut]))
    as_json = asked.pop("json")
    try:
        report = prove(Options(**asked, args=given[cut + 1 :]))
    except Unanswered as error:
        report = {"verdict": "unanswered", "why": str(error)}
    if sys.stderr.isatty():  # the bar stays
        print(file=sys.stderr)
    report = finite({"script": str(asked["script"]), **report})
    print(json.dumps(report, indent=2) if as_json else "\n".join(sentences(report)))
    verdicts = {report["verdict"], report.get("resume", report)["verdict"]}
    return 1 if "differs" in verdicts else 2 if "unanswered" in verdicts else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] TRAIN.PY [-- ARGS]",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="exit status: 0 identical, 1 it differs, 2 no answer",
    )
    add = parser.add_argument
    add("script", type=Path, metavar="TRAIN.PY", help="the training script; its ARGS follow --")
    add("--patched", type=Path, metavar="FILE", help="the patched script, in place of autopatch's")
    add("--root", type=Path, help="folder to copy and to start in; by default the script's")
    add("--start", type=Path, metavar="DIR", help="folder within it to start in instead")
    add(
        "--link",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="large data in it: only read, and so linked and not copied",
    )
    add("--seed", type=int, default=0, help="of python, numpy and torch, before the script's own")
    add("--steps", type=int, metavar="N", help="end each run after N optimizer steps")
    add("--kill", type=int, default=0, metavar="N", help="prove resume too, with N kills")
    add(
        "--pairs",
        type=int,
        default=2,
        metavar="N",
        help="runs of either script (2); the original runs twice at least, to see what varies",
    )
    add(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes under torchrun; rank 0 is compared, and the end of the others",
    )
    add("--json", action="store_true", help="print the report as JSON")
    return parser


def sentences(report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each fact, those within another indented."""
    yield f"{report['script']}: {report['verdict']}"
    for name, fact in report.items():
        if fact and name not in ("script", "verdict"):
            yield from _sentence(name.replace("_", " "), fact)


def _sentence(name: str, fact: Any, indent: str = "  ") -> Iterator[str]:
    if isinstance(fact, dict) and any(isinstance(item, dict | list) for item in fact.values()):
        verdict = filter(None, (fact.get("verdict"), fact.get("why")))
        yield f"{indent}{name}: {': '.join(verdict)}".rstrip(": ")
        for key, item in fact.items():
            if item and key not in ("verdict", "why"):
                yield from _sentence(key.replace("_", " "), item, f"{indent}  ")
    elif isinstance(fact, dict):
        yield f"{indent}{name}: {', '.join(f'{key} {shown(item)}' for key, item in fact.items())}"
    elif isinstance(fact, list):
        for item in fact:
            yield from _sentence(name, item, indent)
    else:
        yield f"{indent}{name}: {shown(fact)}"


def shown(fact: Any) -> str:
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)


def finite(tree: Any) -> Any:
    """Strict JSON: NaN and infinities as strings."""
    if isinstance(tree, dict):
        return {name: finite(item) for name, item in tree.items()}
    if isinstance(tree, list):
        return [finite(item) for item in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


if __name__ == "__main__":
    sys.exit(main())
