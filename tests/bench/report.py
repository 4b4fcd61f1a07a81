"""Facts of the machine, ratios, and the table that is printed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from peers import OURS

Figures = dict[str, dict[str, Any]]

# key, heading, digits
COLUMNS = (
    ("call_median_us", "call us", 2),
    ("call_p99_us", "p99", 1),
    ("call_mean_us", "mean", 1),
    ("train_median_us", "beside train", 1),
    ("train_p99_us", "p99", 1),
    ("cpu_tight_net_us", "CPU us", 1),
    ("cpu_paced_net_us", "at 2 ms", 1),
    ("import_ms", "import ms", 1),
    ("init_ms", "init ms", 1),
    ("close_ms", "close ms", 1),
    ("close_full_ms", "full", 1),
    ("processes", "procs", 0),
    ("memory_growth_mib", "MiB +", 1),
    ("kill_lost_median", "lost", 0),
    ("kill_lost_max", "max", 0),
    ("kill_twice", "twice", 0),
)
# What a ratio makes sense of: costs that are never nought.
RATIOS = (
    "call_median_us",
    "call_p99_us",
    "call_mean_us",
    "train_median_us",
    "train_p99_us",
    "cpu_tight_net_us",
    "cpu_paced_net_us",
    "import_ms",
    "init_ms",
    "close_ms",
    "close_full_ms",
)
# What ours is to stay under.
TARGETS = {
    "call_median_us": 5.0,
    "call_p99_us": 16.0,
    "call_mean_us": 7.0,
    "train_median_us": 90.0,
    "train_p99_us": 150.0,
    "cpu_tight_net_us": 12.0,
    "cpu_paced_net_us": 40.0,
    "import_ms": 30.0,
    "close_ms": 100.0,
    "close_full_ms": 100.0,
    "processes": 0,
    "kill_lost_max": 0,
    "kill_twice": 0,
}
# A peer's figure over ours, at least.
OVER_OURS = {("SummaryWriter", "call_median_us"): 40.0, ("json", "train_median_us"): 1.0}


def machine(scratch: Path) -> dict[str, Any]:
    """What a reader needs to know to compare figures with those of another machine."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1m_at_start": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "numpy": _version("numpy"),
        "file_system": _file_system(scratch),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), None)


def _file_system(path: Path) -> str | None:
    """Type of the file system that `path` lies on: the longest mount point above it."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(m[1]), m[2]) for m in mounts if path.resolve().is_relative_to(m[1])]
    return max(above)[1] if above else None


def compare(figures: Figures) -> dict[str, Any]:
    """`ratios` of each peer to ours, and ours against its `targets`."""
    ours = figures.get(OURS)
    if ours is None:
        return {"ratios": {}, "targets": {}}
    ratios = {
        name: {key: _ratio(values.get(key), ours[key]) for key in RATIOS if key in ours}
        for name, values in figures.items()
        if name != OURS
    }
    targets = {
        key: {"measured": ours[key], "at_most": limit, "reached": ours[key] <= limit}
        for key, limit in TARGETS.items()
        if key in ours
    }
    for (name, key), least in OVER_OURS.items():
        ratio = ratios.get(name, {}).get(key)
        if ratio is not None:
            reached = ratio >= least
            targets[f"{name} / ours, {key}"] = {
                "measured": ratio,
                "at_least": least,
                "reached": reached,
            }
    return {"ratios": ratios, "targets": targets}


def _ratio(peer: float | None, ours: float | None) -> float | None:
    return peer / ours if peer is not None and ours is not None and ours > 0 else None


# --- As text --------------------------------------------------------------------------------


def text(result: dict[str, Any]) -> str:
    parts = [_facts(result), _table(result["peers"], COLUMNS)]
    if result["ratios"]:
        columns = tuple((key, heading, 1) for key, heading, _ in COLUMNS if key in RATIOS)
        parts += ["times ours", _table(result["ratios"], columns), _targets(result["targets"])]
    return "\n\n".join(parts)


def _facts(result: dict[str, Any]) -> str:
    m = result["machine"]
    line = f"{m['cpu']}, {m['cores']} cores, python {m['python']}, torch {m['torch']}"
    return line + (" (quick: figures mean little)" if result["quick"] else "")


def _table(rows: Figures, columns: tuple[tuple[str, str, int], ...]) -> str:
    shown = [c for c in columns if any(c[0] in values for values in rows.values())]
    cells = [["", *(heading for _, heading, _ in shown)]]
    for name, values in rows.items():
        cells.append([name, *(_cell(values.get(key), digits) for key, _, digits in shown)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _targets(targets: dict[str, dict[str, Any]]) -> str:
    lines = []
    for key, target in targets.items():
        bound = "at most" if "at_most" in target else "at least"
        limit = target["at_most"] if "at_most" in target else target["at_least"]
        verdict = "reached" if target["reached"] else "MISSED" + _by(target["measured"], limit)
        lines.append(f"{key:>36}  {target['measured']:>9.2f}  {bound} {limit:g}: {verdict}")
    return "\n".join(lines)


def _by(measured: float, limit: float) -> str:
    return f" by {abs(measured / limit - 1):.0%}" if limit else ""
