"""Kill a stepping process at a random moment and count what can still be read."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import processes
from measure import Job

if TYPE_CHECKING:
    from bench_step import Lab

ONE_PACE = (0.002,)  # seconds between two steps
EVERY_PACE = (0.002, 0.0002, 0.0)
_START_S, _ORPHAN_S = 120.0, 10.0


def trials(lab: Lab, name: str, paces: tuple[float, ...]) -> dict[str, float]:
    """Steps lost and steps twice over the planned kills, the paces taken in turn."""
    found = [_trial(lab, name, trial, paces[trial % len(paces)]) for trial in range(lab.plan.kills)]
    if not found:
        return {}
    lost = [trial["lost"] for trial in found]
    return {
        "kills": len(found),
        "kill_steps": sum(trial["steps"] for trial in found),
        "kill_lost_median": statistics.median(lost),
        "kill_lost_max": max(lost),
        "kill_twice": sum(trial["twice"] for trial in found),
        "kill_all_lost": sum(trial["lost"] == trial["steps"] for trial in found),
    }


def _trial(lab: Lab, name: str, trial: int, pace_s: float) -> dict[str, float]:
    job = lab.job(name, ["until_killed"], pace_s=pace_s)
    Path(job.result).write_bytes(bytes(8))
    process = lab.spawn(job)
    try:
        _wait_for_a_step(lab, process, job)
        time.sleep(random.Random(trial).uniform(*lab.plan.kill_within_s))
        below = processes.descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    done = _steps_done(job)
    _let_orphans_finish(below)
    result = job.result + ".count"
    counting = replace(job, measures=["count"], acknowledged=done, result=result)
    lab.finish(lab.spawn(counting), counting)
    figures: dict[str, float] = json.loads(Path(counting.result).read_text())
    shutil.rmtree(Path(job.folder).parent, ignore_errors=True)
    return figures


def _wait_for_a_step(lab: Lab, process: subprocess.Popen[bytes], job: Job) -> None:
    until = time.monotonic() + _START_S
    while _steps_done(job) == 0:
        if process.poll() is not None:
            lab.finish(process, job)  # says why it ended
            raise SystemExit(f"{job.peer}: ended before its first step")
        if time.monotonic() > until:
            raise SystemExit(f"{job.peer}: no step within {_START_S:.0f} s")
        time.sleep(0.01)


def _steps_done(job: Job) -> int:
    return int(struct.unpack("<q", Path(job.result).read_bytes())[0])


def _let_orphans_finish(pids: list[int]) -> None:
    """A helper process that outlives the kill may still write; count when it is gone."""
    until = time.monotonic() + _ORPHAN_S
    while any(map(processes.alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in filter(processes.alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
