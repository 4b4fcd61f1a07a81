"""What a checkpoint costs the loop, side by side with torch.save and PyTorch's own DCP.

    python tests/bench/bench_save.py            27M parameters + AdamW, 325 MB, on the CPU
    python tests/bench/bench_save.py --cuda     27M + SGD and 335M + AdamW (4 GB) on one GPU
    python tests/bench/bench_save.py --quick    a tiny one, to see that it works

Medians of alternating repeats in one process, after a warm-up of everything; with one thread
(OMP_NUM_THREADS=1) where cores are few, for the write needs one. `blocked`: the call alone; ours is
a step() that saves. `loop`: the extra wall time of a window of steps that holds one save, against
the windows around it, with the quartiles (all end with a device synchronize; `to durable` outlasts
the write). `durable`: from the call to the moment that a power cut would keep it (DCP: until its
future). `item`: the longest that a loss.item() of the loop waits beside the write, and without one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

sys.path.insert(0, str(Path(__file__).parents[2] / "mainrun"))
import observability as obs

SIZES = {  # width, layers, vocabulary, batch, length, optimizer
    "tiny": (64, 2, 500, 2, 16, "AdamW"),
    "beside": (256, 4, 2000, 2, 32, "AdamW"),
    "27M+AdamW": (512, 6, 16000, 2, 64, "AdamW"),
    "27M+SGD": (512, 6, 16000, 64, 128, "SGD"),
    "335M+AdamW": (1024, 24, 32000, 8, 512, "AdamW"),
}


class Model(nn.Module):
    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.emb(ids)))


class Training:
    def __init__(self, size: str, device: str) -> None:
        width, layers, vocabulary, batch, length, name = SIZES[size]
        torch.manual_seed(0)
        self.device, self.step_count = device, 0
        self.model = Model(width, layers, vocabulary).to(device)
        options = {"lr": 1e-4} if name == "AdamW" else {"lr": 1e-4, "momentum": 0.0}
        self.optimizer = getattr(torch.optim, name)(self.model.parameters(), **options)
        self.ids = torch.randint(0, vocabulary, (batch, length), device=device)

    def step(self) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(self.ids)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), self.ids.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step_count += 1
        return loss

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def bytes(self) -> int:
        """Of the state, tied weights once."""
        moments = self.optimizer.state_dict()["state"].values()
        every = [self.model.state_dict(), *moments]
        tensors = [t for each in every for t in each.values() if isinstance(t, torch.Tensor)]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def window(self, steps: int, save: Callable[[], Any] | None = None) -> float:
        """Seconds of `steps` steps; `save`, if any, comes after the first."""
        self.step()
        self.sync()
        start = time.perf_counter()
        self.step()
        if save is not None:
            save()
        for _ in range(steps - 1):
            self.step()
        self.sync()
        return time.perf_counter() - start


# --- The ways to save: `call` is what the loop waits for, `wait` is until it is durable ----------


class Ours:
    """A run of its own, whose step() saves when save() has asked for it."""

    def __init__(self, training: Training, directory: Path) -> None:
        self.training = training
        settings = {"tb_dir": directory / "tb", "system_interval": 0, "plot_interval": 0}
        self.run = obs.Run("ours", out_dir=directory, save_interval="999999999", **settings)
        self.run.watch(training.model, optimizer=training.optimizer)
        self.run.resume()
        self.run.step(training.step_count)  # the first one reserves the memory, behind
        self.run.settle()

    def call(self) -> None:
        self.run.save()
        self.run.step(self.training.step_count)

    def wait(self) -> float:
        self.run.settle()
        return time.perf_counter()

    def saved(self, step: int) -> Path:
        path = obs.latest_ckpt(self.run.dir / "checkpoints")
        assert path is not None
        assert path.name == f"step_{step:08d}", "the save has failed"
        return path


class TorchSave:
    def __init__(self, training: Training, directory: Path) -> None:
        self.training, self.path = training, directory / "latest.pt"
        directory.mkdir(parents=True)

    def call(self) -> None:
        with open(self.path, "wb") as file:
            torch.save(self.training.state(), file)
            file.flush()
            os.fsync(file.fileno())

    def wait(self) -> float:
        return time.perf_counter()


class Dcp:
    def __init__(self, training: Training, directory: Path, way: str) -> None:
        self.training, self.directory, self.way, self.count = training, directory, way, 0
        cuda = training.device == "cuda"
        options = StagingOptions(cuda, False, False, cuda)  # pinned, blocking; kept, so cached
        self.stager = DefaultStager(options) if "cached" in way else None
        self.future: Any = None
        self.done_at = 0.0

    def call(self) -> None:
        self.count += 1
        path = self.directory / str(self.count)
        shutil.rmtree(self.directory, ignore_errors=True)
        writer = dcp.FileSystemWriter(path)
        if self.way == "dcp.save":
            dcp.save(self.training.state(), storage_writer=writer, no_dist=True)
            return
        self.future = dcp.async_save(
            self.training.state(), storage_writer=writer, async_stager=self.stager, no_dist=True
        )
        self.future.add_done_callback(lambda _: setattr(self, "done_at", time.perf_counter()))

    def wait(self) -> float:
        if self.future is None:
            return time.perf_counter()
        self.future.result()
        time.sleep(0.01)  # the callback may still be on its way
        return self.done_at


class Memcpy:
    """The floor: one warm copy of as many bytes, host to host (device to device on a GPU)."""

    def __init__(self, training: Training, size: int) -> None:
        self.training = training
        self.of = torch.ones(size, dtype=torch.uint8, device=training.device)
        self.to = torch.ones_like(self.of)

    def call(self) -> None:
        self.to.copy_(self.of)
        self.training.sync()

    def wait(self) -> float:
        return time.perf_counter()


# --- Measurements ------------------------------------------------------------------------------


def measure(training: Training, ways: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Median blocked and durable seconds of each way, alternating; a step between any two."""
    found: dict[str, dict[str, list[float]]] = {n: {"blocked": [], "durable": []} for n in ways}
    for name in [name for name in ways if name.startswith("dcp")]:
        try:
            for _ in range(2):
                ways[name].call()
                ways[name].wait()
        except Exception as error:  # a peer that does not run here is named, and left out
            print(f"{name} fails: {type(error).__name__}: {str(error)[:200]}", flush=True)
            del ways[name], found[name]
    for repeat in range(-1, repeats):  # the first round warms up and does not count
        for name, way in ways.items():
            training.step()
            training.sync()
            start = time.perf_counter()
            way.call()
            blocked = time.perf_counter() - start
            durable = way.wait() - start
            if repeat >= 0:
                found[name]["blocked"].append(blocked)
                found[name]["durable"].append(durable)
    return {n: {k: statistics.median(v) for k, v in f.items()} for n, f in found.items()}


def steps_beside_write(loop: Training, ours: Ours, rounds: int) -> float:
    """Median step of `loop` during the write over the median before it; the median of the rounds.

    The loop is smaller than what is written: a write must outlast many of its steps.
    """
    ratios = []
    for _ in range(rounds):
        alone = [loop.window(1) for _ in range(40)]
        ours.training.step_count += 1
        ours.call()
        durable = threading.Thread(target=ours.wait)
        durable.start()
        beside = []
        while durable.is_alive() or not beside:
            beside.append(loop.window(1))
        ratios.append(statistics.median(beside) / statistics.median(alone))
    return statistics.median(ratios)


def loop_cost(training: Training, way: Any, steps: int, rounds: int) -> list[float]:
    """Extra seconds of a window with one save in it, paired with the windows around it: the median
    of the rounds, and the quartiles."""
    costs = []
    for _ in range(rounds):
        before = training.window(steps)
        with_save = training.window(steps, way.call)
        way.wait()
        after = training.window(steps)
        costs.append(with_save - (before + after) / 2)
    low, middle, high = statistics.quantiles(costs, n=4) if rounds > 1 else costs * 3
    return [middle, low, high]


def longest_item(training: Training, steps: int, save: Callable[[], Any] = lambda: None) -> float:
    """Seconds that a loss.item() takes at most, in a loop that has one for each step."""
    longest = 0.0
    for number in range(steps):
        if number == 1:
            save()
        loss = training.step()
        if training.device == "cuda":  # what it waits for from here on is not the step
            torch.cuda.current_stream().synchronize()
        start = time.perf_counter()
        loss.item()
        longest = max(longest, time.perf_counter() - start)
    return longest


def exact(training: Training, ours: Ours) -> bool:
    """Whether what is on disk is what was in memory at the call, though steps went on."""
    expected = {n: t.detach().clone() for n, t in training.model.state_dict().items()}
    momenta = [
        {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)}
        for s in training.optimizer.state_dict()["state"].values()
    ]
    ours.call()
    step = training.step_count
    for _ in range(3):
        training.step()
    ours.wait()
    path = ours.saved(step)
    saved = obs.load_file(path, "model.pth")
    state = obs.load_file(path, "optimizer.pt")["optimizer"]["state"]
    return all(torch.equal(saved[n], t.cpu()) for n, t in expected.items()) and all(
        torch.equal(state[i][k], v.cpu()) for i, s in enumerate(momenta) for k, v in s.items()
    )


def peak_growth(job: Callable[[], Any]) -> int:
    """Bytes by which this process's resident memory was larger at its peak during `job`."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    start, peak, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    job()
    stop.set()
    watcher.join()
    return max(peak[0], resident()) - start


def bench(size: str, device: str, directory: Path, repeats: int, full: bool) -> dict[str, Any]:
    training = Training(size, device)
    for _ in range(3):
        training.step()
    training.sync()
    made: list[Ours] = []
    ours_at = directory / "ours"

    def first_save() -> None:
        made.append(Ours(training, ours_at))
        made[0].call()
        made[0].wait()

    growth = peak_growth(first_save)
    ours, state_bytes = made[0], training.bytes()
    result: dict[str, Any] = {"size": size, "device": device, "bytes": state_bytes}
    result["peak_host_memory_over_state"] = growth / state_bytes
    training.step()
    result["exact"] = exact(training, ours)
    ways = {"memcpy": Memcpy(training, state_bytes), "ours": ours}
    if full:
        ways["torch.save+fsync"] = TorchSave(training, directory / "torch")
        for name in ("dcp.save", "dcp.async_save", "dcp.async_save cached"):
            ways[name] = Dcp(training, directory / name.replace(" ", "-"), name)
    result["ways"] = measure(training, ways, repeats)
    del ways["memcpy"]
    if device == "cuda":
        training.sync()
        step = training.window(20) / 20
        result["step"] = step
        for name in [n for n in ("ours", "dcp.async_save", "dcp.async_save cached") if n in ways]:
            durable = result["ways"][name]["durable"]
            short, long = 10, max(10, min(400, int(1.3 * durable / step)))
            result["ways"][name]["loop"] = loop_cost(training, ways[name], short, 3 * repeats)
            result["ways"][name]["loop_to_durable"] = loop_cost(training, ways[name], long, repeats)
            result["ways"][name]["item"] = longest_item(training, long, ways[name].call)
            ways[name].wait()
        result["item_without_a_save"] = longest_item(training, long)
    else:
        result["steps_beside_write"] = steps_beside_write(Training("beside", device), ours, repeats)
    result["resume"] = resume(Training(size, device), ours)
    ours.run.finish()
    return result


def resume(training: Training, ours: Ours) -> dict[str, float]:
    """Seconds to read and check a checkpoint, and to resume from it, neither in the page cache."""
    watched: dict[str, list[Any]] = {kind: [] for kind in obs.KINDS}
    watched |= {"model": [training.model], "optimizer": [training.optimizer]}
    path = obs.latest_ckpt(ours.run.dir / "checkpoints")
    forget(path)
    start = time.perf_counter()
    assert obs.is_valid_ckpt(path)
    check = time.perf_counter() - start
    forget(path)
    start = time.perf_counter()
    obs.restore(path, watched)
    training.sync()
    load = time.perf_counter() - start
    rate = sum(file.stat().st_size for file in path.iterdir()) / load / 1e9
    return {"check": check, "resume": load, "check_over_resume": check / load, "GB_per_s": rate}


def forget(path: Path) -> None:
    for file in path.iterdir():
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(result: dict[str, Any]) -> str:
    ways = result["ways"]
    floor = ways["memcpy"]["blocked"]
    columns = ("blocked", "loop", "loop_to_durable", "item", "durable")
    lines = [
        f"{result['size']} on {result['device']}, {result['bytes'] / 1e6:.0f} MB",
        f"{'':22}" + "".join(f"{c + ' ms':>24}" for c in columns) + f"{'blocked/memcpy':>16}",
    ]
    for name, row in ways.items():
        cells = (f"{milliseconds(row.get(c)):>24}" for c in columns)
        lines.append(f"{name:22}" + "".join(cells) + f"{row['blocked'] / floor:16.2f}")
    others = {k: v for k, v in result.items() if k not in ("ways", "size", "device", "bytes")}
    return "\n".join([*lines, *(f"{key}: {value}" for key, value in others.items()), ""])


def milliseconds(seconds: float | list[float] | None) -> str:
    if isinstance(seconds, list):
        return "{:.2f} ({:.2f} to {:.2f})".format(*(1000 * each for each in seconds))
    return "-" if seconds is None else f"{1000 * seconds:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cuda", action="store_true", help="the two sizes of the GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny size, twice")
    parser.add_argument("--size", choices=SIZES, help="one size only")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/bench_save"), help="on the disk")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    if args.quick:
        args.size, args.repeats = "tiny", 2
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = "cuda" if args.cuda else "cpu"
    default = ["27M+SGD", "335M+AdamW"] if args.cuda else ["27M+AdamW"]
    results = []
    for size in [args.size] if args.size else default:
        shutil.rmtree(args.dir, ignore_errors=True)
        results.append(bench(size, device, args.dir, args.repeats, full=True))
        print(table(results[-1]), flush=True)
        if args.cuda:
            # The same with no room for a copy of the state: a real tensor fills the device.
            gc.collect()  # the first training, to the last view of it
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            filler = torch.empty(max(0, free - total // 11), dtype=torch.uint8, device="cuda")
            shutil.rmtree(args.dir, ignore_errors=True)
            results.append(bench(size, device, args.dir, args.repeats, full=False))
            print("no room for a copy on the device:", table(results[-1]), sep="\n", flush=True)
            del filler
    shutil.rmtree(args.dir, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
