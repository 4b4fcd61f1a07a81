"""Measure `observability.step()` beside other ways to record a training step.

    python tests/bench/bench_step.py [--quick] [--peers ours,empty,wandb] [--json PATH]
    python tests/bench/bench_step.py --peers ours --only kills --kills 100 --every-pace
    python tests/bench/bench_step.py --peers ours --only memory --long

Every peer runs in a process of its own, peers alternate within a round, and a figure is the
median over rounds. Prints a table, the ratios peer / ours and ours against its targets, and
writes all of it as JSON. Nothing here passes or fails: it reports. Linux only (reads /proc).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import kills
import report
from measure import QUICK, Job, Plan
from peers import PEERS, find_ours, installed

HERE = Path(__file__).resolve().parent
ROUND = ("start", "calls", "train", "cpu", "close")  # measured in every round
ONCE = ("memory", "kills")
Figures = dict[str, dict[str, Any]]


def main() -> None:
    args = _arguments()
    plan = QUICK if args.quick else Plan()
    if args.long:
        plan = replace(plan, memory_steps=10_000_000, memory_s=3600.0)
    given = {"kills": args.kills, "rounds": args.rounds}
    plan = replace(plan, **{key: value for key, value in given.items() if value is not None})
    find_ours(args.ours)
    with Lab(plan, args) as lab:
        result = {"machine": report.machine(lab.scratch), "quick": args.quick, **bench(lab, args)}
    result |= report.compare(result["peers"])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(report.text(result))
    print(f"\nwritten to {args.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it works")
    parser.add_argument("--peers", default=",".join(PEERS), help="which (default: all)")
    parser.add_argument("--json", type=Path, default=HERE / "out" / "step.json")
    parser.add_argument("--only", default=",".join((*ROUND, *ONCE)), help="which (default: all)")
    parser.add_argument("--rounds", type=int, help="how often each is measured (default 3)")
    parser.add_argument("--kills", type=int, help="kills per peer (default 10)")
    parser.add_argument(
        "--every-pace", action="store_true", help="kill at 2 ms a step, at 0.2 ms, at full speed"
    )
    parser.add_argument(
        "--long", action="store_true", help="memory over 10 million steps: minutes and 4 GB"
    )
    parser.add_argument(
        "--ours",
        type=Path,
        default=HERE.parents[1] / "mainrun",
        help="the folder that holds observability.py",
    )
    parser.add_argument("--scratch", type=Path, help="where runs are written (default: TMPDIR)")
    args = parser.parse_args()
    args.peers, args.only = args.peers.split(","), args.only.split(",")
    args.ours = args.ours.resolve()
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"unknown peers {sorted(unknown)}; there are {', '.join(PEERS)}")
    if unknown := set(args.only) - {*ROUND, *ONCE}:
        parser.error(f"unknown {sorted(unknown)}; there are {', '.join((*ROUND, *ONCE))}")
    return args


def bench(lab: Lab, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of the peers that are installed."""
    names = [name for name in args.peers if installed(name)]
    missing = [name for name in args.peers if name not in names]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    figures: Figures = {name: {"version": PEERS[name]().version()} for name in names}
    if "train" in args.only and not lab.plan.batch:
        batch = int(lab.measure("empty", ["calibrate"])["batch"])
        lab.plan = replace(lab.plan, batch=batch)
    _rounds(lab, figures, [what for what in ROUND if what in args.only])
    if "memory" in args.only:
        for name in names:
            figures[name] |= lab.measure(name, ["memory"])
    if "cpu" in args.only:
        _subtract_floor(figures)
    if "kills" in args.only:
        paces = kills.EVERY_PACE if args.every_pace else kills.ONE_PACE
        for name in (name for name in names if name != "empty"):
            figures[name] |= kills.trials(lab, name, paces)
    return {"peers": figures, "missing": missing, "plan": vars(lab.plan)}


def _rounds(lab: Lab, figures: Figures, measures: list[str]) -> None:
    """Every figure is the median over rounds; the single ones are kept under `rounds`."""
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in figures}
    groups = [measures] if lab.plan.together else [[what] for what in measures]
    for _, group in itertools.product(range(lab.plan.rounds), groups):
        for name in figures:
            for key, value in lab.measure(name, group).items():
                seen[name].setdefault(key, []).append(value)
    for name, columns in seen.items():
        figures[name] |= {key: statistics.median(values) for key, values in columns.items()}
        figures[name]["rounds"] = columns


def _subtract_floor(figures: Figures) -> None:
    """CPU time is net of the same loop around an empty call."""
    floor = figures.get("empty")
    for name, values in figures.items():
        for key in ("cpu_tight_us", "cpu_paced_us"):
            if floor and name != "empty":
                values[key.replace("_us", "_net_us")] = values[key] - floor[key]


class Lab:
    """Starts measuring processes, each in a fresh folder and with a home of its own."""

    def __init__(self, plan: Plan, args: argparse.Namespace) -> None:
        self.plan, self.ours = plan, str(args.ours)
        self.scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=args.scratch))
        self._made = 0

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def measure(self, name: str, measures: list[str]) -> dict[str, float]:
        """What is measured in a process of its own; what it wrote is removed."""
        job = self.job(name, measures)
        self.finish(self.spawn(job), job)
        figures: dict[str, float] = json.loads(Path(job.result).read_text())
        shutil.rmtree(Path(job.folder).parent, ignore_errors=True)
        return figures

    def job(self, name: str, measures: list[str], **settings: Any) -> Job:
        self._made += 1
        place = self.scratch / f"{self._made:04d}-{name}"
        (place / "run").mkdir(parents=True)
        result = str(place / "result")
        return Job(name, measures, str(place / "run"), result, self.ours, self.plan, **settings)

    def spawn(self, job: Job) -> subprocess.Popen[bytes]:
        place = Path(job.folder).parent
        where = place / f"{job.measures[0]}.json"
        job.dump(where)
        if sys.stderr.isatty():
            print(f"{job.peer:>14} {'+'.join(job.measures):<40}", end="\r", file=sys.stderr)
        command = [sys.executable, str(HERE / "measure.py"), str(where)]
        with open(place / "log", "ab") as log:
            return subprocess.Popen(
                command,
                cwd=job.folder,
                env=_environment(Path(job.folder)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def finish(self, process: subprocess.Popen[bytes], job: Job) -> None:
        if process.wait() != 0:
            log = (Path(job.folder).parent / "log").read_text(errors="replace")
            raise SystemExit(f"{job.peer}: measuring {job.measures} failed:\n{log[-4000:]}")


def _environment(folder: Path) -> dict[str, str]:
    """Nobody's home is touched, nothing is sent anywhere, and bytecode is cached as usual."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("WANDB_", "TRACKIO_", "HF_", "OBS_"))
    }
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # else every start would compile its imports
    return kept | {
        "HOME": str(folder),
        "WANDB_MODE": "disabled",  # for ours; the wandb peer asks for offline itself
        "WANDB_ERROR_REPORTING": "false",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "TB_AUTO": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }


if __name__ == "__main__":
    main()
