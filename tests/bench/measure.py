"""Measures one peer in a process of its own: `python measure.py JOB.json`.

The job names the peer, what to measure, the folder to write in and the plan (how much of it);
the result is a flat dict of numbers, written as JSON to `result`. Run by bench_step.py, which
asks for one measurement a process, but when it is in a hurry.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import perf_counter, perf_counter_ns

import processes
from peers import PEERS, Peer, find_ours

# Values as a training prints them: 16 or 17 digits, none like the one before.
LOSSES = [Random(step).uniform(2.0, 9.0) for step in range(1024)]
_CHUNK = 100  # steps between two looks at the clock


@dataclass(frozen=True)
class Plan:
    """How much of everything; the same for every peer."""

    rounds: int = 3
    warmup: int = 1000
    calls: int = 5000  # at least so many timed calls, and at least so long:
    calls_s: float = 1.0
    cpu_steps: int = 20_000  # at most so many, and at most so long:
    cpu_s: float = 4.0
    paced_steps: int = 1500
    pace_s: float = 0.002
    settle_s: float = 1.5  # longer than any peer's flush timer
    train_steps: int = 200
    train_ms: float = 20.0
    burst_steps: int = 100_000  # what a close meets at once: at most so many, at most so long
    burst_s: float = 2.0
    memory_steps: int = 200_000
    memory_s: float = 6.0
    kills: int = 10
    kill_within_s: tuple[float, float] = (0.2, 2.0)
    batch: int = 0  # of the training step; 0 finds the one that takes `train_ms`
    together: bool = False  # all measurements of a peer in one process


QUICK = Plan(
    rounds=1,
    warmup=100,
    calls=500,
    calls_s=0.05,
    cpu_steps=2000,
    cpu_s=0.5,
    paced_steps=50,
    settle_s=0.2,
    train_steps=10,
    burst_steps=5000,
    burst_s=0.3,
    memory_steps=5000,
    memory_s=0.3,
    kills=1,
    kill_within_s=(0.1, 0.3),
    batch=4,
    together=True,
)


@dataclass(frozen=True)
class Job:
    """One process's work."""

    peer: str
    measures: list[str]
    folder: str
    result: str
    ours: str  # the folder that holds observability.py
    plan: Plan
    pace_s: float = 0.0  # between two steps until killed
    acknowledged: int = 0  # steps that had returned before the kill

    def dump(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        return cls(**{**fields, "plan": Plan(**fields["plan"])})


def main() -> None:
    job = Job.load(Path(sys.argv[1]))
    find_ours(Path(job.ours))
    result: dict[str, float] = {}
    for name in job.measures:
        result |= MEASURES[name](PEERS[job.peer](), job)
    Path(job.result).write_text(json.dumps(result))


def _open(peer: Peer, job: Job) -> None:
    peer.prepare()
    peer.load()
    peer.start(Path(job.folder))


# --- What a call costs the loop -------------------------------------------------------------


def calls(peer: Peer, job: Job) -> dict[str, float]:
    """Length of a call in a tight loop, with all that queues and threads do to it."""
    _open(peer, job)
    plan, step, lengths = job.plan, peer.step, array("q")
    for i in range(plan.warmup):
        step(i, LOSSES[i & 1023])
    at, until = plan.warmup, perf_counter() + plan.calls_s
    while len(lengths) < plan.calls or perf_counter() < until:
        for i in range(at, at + _CHUNK):
            loss = LOSSES[i & 1023]
            begin = perf_counter_ns()
            step(i, loss)
            lengths.append(perf_counter_ns() - begin)
        at += _CHUNK
    peer.close()
    return _spread("call", lengths) | {"calls": len(lengths)}


def train(peer: Peer, job: Job) -> dict[str, float]:
    """Length of a call beside a real training step, which leaves caches cold and threads busy."""
    from workload import Workload

    work, lengths, steps = Workload(job.plan.batch), array("q"), array("q")
    _open(peer, job)
    warm = max(3, job.plan.train_steps // 10)
    for i in range(job.plan.train_steps + warm):
        start = perf_counter_ns()
        loss = work.step()
        begin = perf_counter_ns()
        peer.step(i, loss)
        lengths.append(perf_counter_ns() - begin)
        steps.append(begin - start)
    peer.close()
    return _spread("train", lengths[warm:]) | {"workload_ms": statistics.median(steps[warm:]) / 1e6}


def _spread(name: str, lengths: array[int]) -> dict[str, float]:
    clock = _clock_ns()
    ordered = sorted(lengths)
    return {
        f"{name}_median_us": (statistics.median(ordered) - clock) / 1e3,
        f"{name}_p99_us": (ordered[int(0.99 * (len(ordered) - 1))] - clock) / 1e3,
        f"{name}_mean_us": (statistics.fmean(ordered) - clock) / 1e3,
    }


def _clock_ns() -> float:
    """What reading the clock adds to a length."""
    lengths = []
    for _ in range(10_000):
        begin = perf_counter_ns()
        lengths.append(perf_counter_ns() - begin)
    return statistics.median(lengths)


# --- What it costs the machine --------------------------------------------------------------


def cpu(peer: Peer, job: Job) -> dict[str, float]:
    """CPU time a step, threads and child processes included, until all of it is written."""
    _open(peer, job)
    plan = job.plan
    _burst(peer, 0, plan.warmup, plan.cpu_s)
    _settle(plan)
    at, before = plan.warmup, processes.cpu_seconds()
    tight = _burst(peer, at, plan.cpu_steps, plan.cpu_s)
    _settle(plan)
    middle = processes.cpu_seconds()
    _paced(peer, at + tight, plan)
    _settle(plan)
    after = processes.cpu_seconds()
    peer.close()
    return {
        "cpu_tight_us": (middle - before) / tight * 1e6,
        "cpu_paced_us": (after - middle) / plan.paced_steps * 1e6,
    }


def _paced(peer: Peer, at: int, plan: Plan) -> None:
    # Sleep, never spin: a spinning loop would hide another thread's work behind its own.
    due = perf_counter()
    for i in range(at, at + plan.paced_steps):
        peer.step(i, LOSSES[i & 1023])
        due += plan.pace_s
        time.sleep(max(0.0, due - perf_counter()))


def _burst(peer: Peer, at: int, steps: int, seconds: float) -> int:
    """Step as fast as it goes, up to so many steps or so long; how many it were."""
    step, done, until = peer.step, 0, perf_counter() + seconds
    while done < steps and perf_counter() < until:
        for i in range(at + done, at + done + _CHUNK):
            step(i, LOSSES[i & 1023])
        done += _CHUNK
    return done


def _settle(plan: Plan) -> None:
    time.sleep(plan.settle_s)


def memory(peer: Peer, job: Job) -> dict[str, float]:
    """Resident memory gained over many steps, looked at when all is written, in ten parts."""
    _open(peer, job)
    plan, done = job.plan, 0
    _burst(peer, 0, plan.warmup, plan.memory_s)
    _settle(plan)
    first = peak = processes.resident_mib()
    for _ in range(10):
        at = plan.warmup + done
        done += _burst(peer, at, plan.memory_steps // 10, plan.memory_s / 10)
        peak = max(peak, processes.resident_mib())
    _settle(plan)
    last = processes.resident_mib()
    peer.close()
    return {
        "memory_growth_mib": last - first,
        "memory_peak_mib": peak - first,
        "memory_steps": done,
    }


# --- Its beginning and its end --------------------------------------------------------------


def start(peer: Peer, job: Job) -> dict[str, float]:
    """Import and opening over a process that has torch; then a close with nothing to write."""
    import torch  # noqa: F401 - what the script has imported anyway

    peer.prepare()
    threads, times = processes.threads(), [perf_counter()]
    peer.load()
    times.append(perf_counter())
    peer.start(Path(job.folder))
    times.append(perf_counter())
    _burst(peer, 0, _CHUNK, 1.0)
    _settle(job.plan)
    extra = {
        "processes": len(processes.descendants(os.getpid())),
        "threads": processes.threads() - threads,
    }
    close_ms = _close_ms(peer)
    return {
        "import_ms": (times[1] - times[0]) * 1e3,
        "init_ms": (times[2] - times[1]) * 1e3,
        "close_ms": close_ms,
        **extra,
    }


def close(peer: Peer, job: Job) -> dict[str, float]:
    """A close straight after a burst, with every queue as full as it gets."""
    _open(peer, job)
    steps = _burst(peer, 0, job.plan.burst_steps, job.plan.burst_s)
    return {"close_full_ms": _close_ms(peer), "close_full_steps": steps}


def _close_ms(peer: Peer) -> float:
    begin = perf_counter()
    peer.close()
    return (perf_counter() - begin) * 1e3


# --- Killed ---------------------------------------------------------------------------------


def until_killed(peer: Peer, job: Job) -> dict[str, float]:
    """Step on; the number of steps that returned lies in a shared map, safe from the kill."""
    with open(job.result, "r+b") as file:
        done = memoryview(mmap.mmap(file.fileno(), 8)).cast("q")
    _open(peer, job)
    i, due = 0, perf_counter()
    until = due + 60.0  # nobody came to kill: whoever was to do it is dead
    while perf_counter() < until:
        peer.step(i, LOSSES[i & 1023])
        i += 1
        done[0] = i
        due = max(due + job.pace_s, perf_counter())
        if job.pace_s:
            time.sleep(max(0.0, due - perf_counter()))
    return {}


def count(peer: Peer, job: Job) -> dict[str, float]:
    """What the killed process left behind, against what had returned to it."""
    found = peer.count(Path(job.folder))
    lost = sum(found[step] < 1 for step in range(job.acknowledged))
    return {"lost": lost, "twice": sum(n > 1 for n in found.values()), "steps": job.acknowledged}


def calibrate(peer: Peer, job: Job) -> dict[str, float]:
    """The batch of a training step of the planned length; no peer takes part."""
    from workload import batch_for

    return {"batch": batch_for(job.plan.train_ms)}


MEASURES: dict[str, Callable[[Peer, Job], dict[str, float]]] = {
    f.__name__: f for f in (calls, train, cpu, memory, start, close, until_killed, count, calibrate)
}

if __name__ == "__main__":
    main()
