"""Prove that a patched training script computes what the original does, to the last bit.

    python prove.py train.py -- ARGS              the original and the patched script, both twice
    python prove.py train.py --steps 50 -- ARGS   the first 50 optimizer steps of each
    python prove.py train.py --kill 3 -- ARGS     and that a killed run comes to the same end
    python prove.py train.py --patched mine.py    another patch than the one autopatch.py makes

Each run is a process of its own in a fresh copy of the script's folder, with the same seed. Noted
are the bits of every loss that is back-propagated, every float that the script reads off a tensor
(validation losses are among them), every optimizer step, and at the end all parameters, buffers,
optimizer states and random generators. An original that differs from itself is said to, and the
verdict is then about how far it drifts. Processes that the script starts are not watched.

Exit status: 0 identical, or within the script's own drift; 1 it differs; 2 no answer, and why.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lines import PatchError, marked_numbers, reverse, split_lines
from recorder import UNREADABLE, Entry, Job

__all__ = ["Options", "Unanswered", "main", "prove"]

HERE = Path(__file__).resolve().parent
DROP_IN = HERE.parent / "mainrun" / "observability.py"
SLACK = 2.0  # times the script's own drift, known from few samples, that the patched one may have
NOT_COPIED = {".git", ".venv", "venv", "node_modules", "__pycache__", "wandb", "runs", "out"}

Difference = dict[str, Any]
Runner = Callable[[Job], int]  # runs `record` in a new process and returns its exit status


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


def prove(options: Options, run: Runner | None = None) -> dict[str, Any]:
    """The verdict and what it stands on. Raises Unanswered."""
    with tempfile.TemporaryDirectory(prefix="prove-", ignore_cleanup_errors=True) as work:
        bench = Bench(options, Path(work), run or fresh_process)
        originals: list[Recording] = []
        patched: list[Recording] = []
        while len(patched) < options.pairs and not (patched and patched[-1].code):
            originals.append(bench.run("original", bench.original))
            originals[-1].check(options.script)
            patched.append(bench.run("patched", bench.patched))
        report = compare(originals, patched)
        if options.kill:
            report["resume"] = prove_resume(bench, originals[0], report["verdict"])
        return report


# --- The verdict ----------------------------------------------------------------------------------


@dataclass
class Recording:
    """What a process did, and how it ended."""

    code: int
    output: str
    entries: list[Entry]
    observed: dict[str, int]  # the drop-in's records by phase: to prove an idle one is no proof

    def of(self, *kinds: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind in kinds]

    @property
    def said(self) -> list[str]:
        """By the drop-in, but that it begins and ends."""
        said = re.findall(r"^observability: (?!(?:start|completed) at step).*", self.output, re.M)
        return said[:10]

    @property
    def failure(self) -> str:
        lines = "\n".join(self.output.strip().splitlines()[-5:])
        return f"it fails with status {self.code}, and these are its last lines:\n{lines}"

    def check(self, script: Path) -> None:
        if self.code:
            raise Unanswered(f"{script} is not patched yet: {self.failure}")
        for entry in self.entries:
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
    first, theirs = originals[0], patched[-1]
    own = _first([difference(first, other) for other in originals[1:]])
    found = _first([difference(first, other) for other in patched])
    drift, their_drift = (
        max((drift_of(first, other) for other in runs), default=0.0)
        for runs in (originals, patched)
    )
    within = own is not None and their_drift <= SLACK * drift
    verdict = "identical" if not (own or found) else "within own drift" if within else "differs"
    return {
        "verdict": "differs" if theirs.code else verdict,
        "why": theirs.failure if theirs.code else "",
        "counts": {kind: len(first.of(kind)) for kind in ("step", "loss", "value", "end")},
        "first_difference": found,
        "own_difference": own,
        "drift": {"original": drift, "patched": their_drift} if own else None,
        "observed": theirs.observed,
        "said": theirs.said,
        "cost": {} if theirs.code else cost(originals, patched),
    }


def difference(one: Recording, other: Recording) -> Difference | None:
    return first_difference(one.of(*COMPARED), other.of(*COMPARED))


COMPARED = ("loss", "value", "step", "end")


def first_difference(ours: Sequence[Entry], theirs: Sequence[Entry]) -> Difference | None:
    for one, other in zip_longest(ours, theirs):
        if one is None or other is None or one.key != other.key:
            there = one or other
            sides = {"original": str(one or "the end"), "patched": str(other or "the end")}
            return {"step": there.step, "kind": there.kind, "place": there.place, **sides}
    return None


def _first(found: Sequence[Difference | None]) -> Difference | None:
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
        return map(statistics.median, zip(*map(times, runs), strict=True))

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


# --- Kills ----------------------------------------------------------------------------------------


def prove_resume(bench: Bench, original: Recording, verdict: str) -> dict[str, Any]:
    """Kill the patched script again and again, beside an uninterrupted run that saves as it."""
    if verdict != "identical":
        return {"verdict": "unanswered", "why": f"without a kill the verdict is: {verdict}"}
    rows = split_lines(bench.patched)
    added = b"".join(rows[number - 1] for number in marked_numbers(bench.patched))
    if b".resume(" not in added and b".skip_epoch(" not in added:
        return {"verdict": "unanswered", "why": "the patch never calls resume() or skip_epoch()"}
    draw = random.Random(bench.options.seed)
    env = {"OBS_RESUME": "auto", "SAVE_INTERVAL": str(draw.choice((1, 2, 3)))}
    whole = bench.run("saving", bench.patched, marks=True, env=env)
    found = difference(original, whole)
    if whole.code or found:
        why = whole.failure if whole.code else "saving alone changes the run"
        return {"verdict": "differs", "why": why, "first_difference": found}
    return {**Kills(bench, whole.of(*COMPARED, "at"), env).run(draw), "said": whole.said}


class Kills:
    """Processes killed one after the other, and one that comes to the end."""

    def __init__(self, bench: Bench, whole: Sequence[Entry], env: dict[str, str]) -> None:
        self.bench, self.whole, self.env = bench, whole, env
        self.runs: list[dict[str, Any]] = []

    def run(self, draw: random.Random) -> dict[str, Any]:
        done = 0  # entries of the uninterrupted run that were reached
        for number, point in enumerate([*self.points(draw), None]):
            part = self.bench.run(
                "to the end" if point is None else f"kill {number + 1}",
                self.bench.patched,
                fresh=number == 0,
                marks=True,
                env=self.env,
                kill_after=point,
                settled=number % 2 == 0,
            )
            at, entries = self.place(part, done)
            rest = self.whole[at:] if part.code == 0 else self.whole[at : at + len(entries)]
            found = first_difference(rest, entries)
            if found or part.code not in (0, -signal.SIGKILL):
                return self.report("differs", part.failure if part.code > 0 else "", found)
            done = at + len(entries)
        resumed = any(run["resumed_at"] is not None for run in self.runs)
        return self.report(
            *(
                ("identical", "")
                if resumed
                else ("unanswered", "no kill left a checkpoint to resume from")
            )
        )

    def points(self, draw: random.Random) -> list[int]:
        """How many entries of the uninterrupted run are through at each kill."""
        every = int(self.env["SAVE_INTERVAL"])
        steps = [i for i, entry in enumerate(self.whole) if entry.kind == "at"]
        saved = (i for i in steps if int(self.whole[i].bits) >= every)
        # From the first checkpoint to the last step: what has completed is not resumed.
        span = range(next(saved, 0) + 1, steps[-1] + 1 if steps else 0)
        points = draw.sample(span, min(self.bench.options.kill, len(span)))
        if len(points) > 1:  # where loops end and break
            points[-1] = steps[-1] + 1
        return sorted(points)

    def place(self, part: Recording, done: int) -> tuple[int, list[Entry]]:
        """Where in the uninterrupted run a process began, and what it did from there on."""
        mark = next((entry for entry in part.entries if entry.kind == "resume"), None)
        entries = part.entries[part.entries.index(mark) + 1 if mark else 0 :]
        at = int(mark.bits) if mark else 0
        killed = entries[-1].step if part.code == -signal.SIGKILL and entries else None
        self.runs.append({"resumed_at": mark and mark.step, "killed_at": killed})
        return at, [entry for entry in entries if entry.kind != "done"]

    def report(self, verdict: str, why: str, found: Difference | None = None) -> dict[str, Any]:
        return {
            "verdict": verdict,
            "why": why,
            "first_difference": found,
            "runs": self.runs,
            "save_interval": int(self.env["SAVE_INTERVAL"]),
        }


# --- The runs -------------------------------------------------------------------------------------


class Bench:
    """A folder in which each run finds a fresh copy of the script, at the same path."""

    def __init__(self, options: Options, work: Path, run: Runner) -> None:
        self.options, self.work, self._run, self._count = options, work, run, 0
        self.root = (options.root or options.script.parent).resolve()
        try:
            given = options.script.read_bytes()
            self.script = work / "copy" / options.script.resolve().relative_to(self.root)
            start = (options.start or self.root).resolve().relative_to(self.root)
            self.start = work / "copy" / start
            self.original = reverse(given, options.script.name)
            self.patched = options.patched.read_bytes() if options.patched else given
        except (OSError, ValueError, PatchError) as error:
            raise Unanswered(f"cannot read the script: {error}") from error
        if self.patched == self.original:
            self.patched = self._patch()

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
        links, copy = [path.resolve() for path in self.options.link], self.work / "copy"

        def left_out(folder: str, names: Sequence[str]) -> set[str]:
            return {name for name in names if name in NOT_COPIED or Path(folder, name) in links}

        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.root, copy, symlinks=True, ignore=left_out)
        for link in links:
            (copy / link.relative_to(self.root)).symlink_to(link)
        self.script.write_bytes(source)
        if source != self.original:
            own = (self.options.patched or self.options.script).with_name("observability.py")
            shutil.copyfile(own if own.exists() else DROP_IN, self.script.with_name(own.name))

    def run(self, name: str, source: bytes, *, fresh: bool = True, **more: Any) -> Recording:
        if fresh:
            self._place(source)
        self._count += 1
        tell(f"run {self._count}: {name}")
        options, result = self.options, self.work / f"{self._count}.jsonl"
        job = Job(
            str(self.script),
            str(self.start),
            list(options.args),
            str(result),
            str(result.with_suffix(".log")),
            options.seed,
            options.steps,
            **more,
        )
        code = self._run(job)
        output = Path(job.log).read_text("utf-8", "replace").replace(f"{job.root}{os.sep}", "")
        entries = [Entry(*fields) for fields in read_lines(result)] if result.exists() else []
        # A kill may leave a journal whose last line is torn.
        return Recording(code, output, entries, {} if code < 0 else self._observed())

    def _observed(self) -> dict[str, int]:
        journals = (self.work / "copy").rglob("metrics.ndjson")
        phases = [line["tags"]["phase"] for path in journals for line in read_lines(path)]
        return {phase: phases.count(phase) for phase in sorted(set(phases))}


def fresh_process(job: Job) -> int:
    """A Python of its own, in the user's environment; what it starts ends with it."""
    asked = Path(job.record).with_suffix(".job")
    asked.write_text(json.dumps(asdict(job)))
    # A drop-in that is turned off proves nothing; sets of strings differ in order by the hash seed.
    given = {k: v for k, v in os.environ.items() if k not in ("OBS_DISABLE", "OBS_RESUME")}
    env = {"PYTHONHASHSEED": str(job.seed % 2**32), "OBS_PLOT_INTERVAL": "0", **given, **job.env}
    with open(job.log, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, HERE / "recorder.py", asked],
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
            if sys.stderr.isatty() and os.path.exists(job.record):
                steps = Path(job.record).read_bytes().count(b'["step"')
                tell(f"{steps} optimizer steps", end="\r")
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
        help="runs of either script (2); with one, a script that differs from itself is missed",
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
        yield f"{indent}{name}:"
        for key, item in fact.items():
            if item:
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
