"""What `observability.py run` costs a script of 20 ms steps, against the script alone.

    python tests/bench/bench_run.py [--quick]

Processes alternate; each prints the median of its steps, after a warm-up. The ratio of a pair
moves with the machine: what is said is the median over the pairs, beside that of a control that
runs the script alone twice. The loop's own processor time moves less than the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OBSERVABILITY = Path(__file__).parents[2] / "mainrun" / "observability.py"
SCRIPT = """
import statistics, time, torch
torch.manual_seed(0)
layers = [torch.nn.Linear(SIZE, SIZE) for _ in range(4)]
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.AdamW(model.parameters())
x, times, cpu = torch.randn(128, SIZE), [], []
for step in range(STEPS):
    start, started = time.perf_counter(), time.thread_time()
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    times.append(time.perf_counter() - start)
    cpu.append(time.thread_time() - started)
print(statistics.median(times[30:]), statistics.fmean(cpu[30:]))
"""


def write(script: Path, size: int, steps: int) -> None:
    script.write_text(SCRIPT.replace("SIZE", str(size)).replace("STEPS", str(steps)))


def step(script: Path, *before: str | Path) -> tuple[float, ...]:
    """Seconds by the clock, the median, and of the loop's processor time, the mean."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OBS_PLOT_INTERVAL": "0"}
    command = [sys.executable, *map(str, before), str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()[-2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one pair, to see that it works")
    quick = parser.parse_args().quick
    pairs, steps, small_steps = (1, 40, 200) if quick else (9, 150, 4000)
    with tempfile.TemporaryDirectory() as folder:
        script, size = Path(folder) / "train.py", 256
        while True:  # a step of about 20 ms on this machine
            write(script, size, steps)
            if (alone := step(script))[0] > 0.015 or size > 2000 or quick:
                break
            size = int(size * 1.25)
        ratios: dict[str, list[tuple[float, float]]] = {"observed": [], "control": []}
        for _ in range(pairs):
            first = step(script)
            for name, before in (("observed", (OBSERVABILITY, "run")), ("control", ())):
                wall, cpu = step(script, *before)
                ratios[name].append((wall / first[0], cpu / first[1]))
        write(script, 16, small_steps)  # steps so small that what is added shows by itself
        added = [step(script, OBSERVABILITY, "run")[1] - step(script)[1] for _ in range(pairs)]
    for name, rows in ratios.items():
        for what, found in zip(("clock", "processor"), zip(*rows, strict=True), strict=True):
            shown = " ".join(f"{ratio:.3f}" for ratio in sorted(found))
            print(f"{name} / alone, {what}: {statistics.median(found):.4f} ({shown})")
    print(f"a step is {1000 * alone[0]:.1f} ms")
    print(
        f"added to the loop's processor time: {1e6 * statistics.median(added):.0f} us a step "
        f"({' '.join(f'{1e6 * each:.0f}' for each in sorted(added))})"
    )


if __name__ == "__main__":
    main()
