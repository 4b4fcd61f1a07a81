"""What observing costs a training on one GPU: `python tests/bench/bench_cuda.py [--quick]`.

Three questions, answered as text and as JSON:
  host     how long does step() with a CUDA loss hold the host, while the GPU has work queued?
           beside SummaryWriter with loss.item() (where tensorboard is installed) and an empty call
  sync     does any call of ours wait for the device? sync debug mode "error" raises if one does
  recipe   by what ratio is the observed reference recipe slower? in one process, on one model and
           random ids, each observed stretch is compared with the unobserved ones around it

Needs torch and this repository; no tokenizer and no headlines.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "mainrun"))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import observability as obs  # noqa: E402

Step = Callable[[int, Tensor], None]
TOKENS = 64 * 128


def main() -> None:
    args = _arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench_cuda: this machine has no CUDA device; bench_step.py needs none")
    if args.device == "cpu":
        torch.set_num_threads(1)  # small steps on a busy machine: threads would wait for each other
    result: dict[str, Any] = {"machine": _machine(args.device), "quick": args.quick}
    with tempfile.TemporaryDirectory(prefix="bench-cuda-") as scratch:
        for question in (host, sync, recipe):
            result[question.__name__] = question(args, Path(scratch))
            print(f"{question.__name__}: {json.dumps(result[question.__name__], indent=1)}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--json", type=Path, default=HERE / "out" / "cuda.json")
    parser.add_argument("--rounds", type=int, default=8, help="alternations of the recipe")
    parser.add_argument("--steps", type=int, default=100, help="steps of each of their stretches")
    # To see on any machine that the bench itself works; its figures then mean nothing.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = 2, 10
    return args


def _machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    python = sys.version.partition(" ")[0]
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": python,
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _observed(name: str, scratch: Path, *watched: nn.Module, **more: Any) -> Iterator[None]:
    obs.init(name, out_dir=str(scratch / "out"), tb_dir=str(scratch / "tb"))
    obs.watch(*watched, **more)
    try:
        yield
    finally:
        obs.finish()


# --- Host time of a call --------------------------------------------------------------------


def host(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Microseconds that a call holds the host while the device is busy, each in turn."""
    work = QueuedWork(args.device)
    lengths: dict[str, list[float]] = {}
    with _observed("host", scratch, work.model, optimizer=work.optimizer), _writer(scratch) as add:
        calls: dict[str, Step] = {"empty": _nothing, "ours": _ours}
        if add is not None:
            calls["SummaryWriter"] = add
        for repetition in range(4):
            for name, call in calls.items():
                taken = work.time(call, first=repetition * 1000, steps=args.steps * 3)
                if repetition:  # the first warms up
                    lengths.setdefault(name, []).extend(taken)
    return {name: _spread(taken) for name, taken in lengths.items()} | {"unit": "us"}


def _nothing(step: int, loss: Tensor) -> None:
    """Same arguments, nothing done."""


_last_step = 0


def _ours(step: int, loss: Tensor) -> None:
    global _last_step
    _last_step += 1  # repetitions start over, a run's steps do not
    obs.step(_last_step, loss=loss, tokens=TOKENS, grad_norm=1.25)


@contextlib.contextmanager
def _writer(scratch: Path) -> Iterator[Step | None]:
    """The usual four add_scalar calls; None where tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(scratch / "writer"))

    def add(step: int, loss: Tensor) -> None:
        writer.add_scalar("loss/train", loss.item(), step)
        writer.add_scalar("lr", 0.006, step)
        writer.add_scalar("speed/tokens_per_sec_step", 412345.678, step)
        writer.add_scalar("grad_norm", 1.25, step)

    yield add
    writer.close()


class QueuedWork:
    """A step of a few launches that keeps the device busy longer than the host takes to queue it.

    The device is caught up with every few steps, outside of what is timed, as a training's own
    logging does it; between them the queue is deep, so a call that waits shows in full.
    """

    CATCH_UP = 20

    def __init__(self, device: str) -> None:
        width = 4096 if device == "cuda" else 64
        self.device = device
        self.model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.model.to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.x = torch.randn(2048 if device == "cuda" else 8, width, device=device)

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.model(self.x).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss

    def time(self, call: Step, first: int, steps: int) -> list[float]:
        taken = []
        for step in range(first, first + steps):
            if step % self.CATCH_UP == 0:
                _wait(self.device)
            loss = self.step()
            begin = time.perf_counter_ns()
            call(step, loss)
            taken.append((time.perf_counter_ns() - begin) / 1e3)
        _wait(self.device)
        return taken


def _spread(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    return {"median": statistics.median(ordered), "p99": p99, "calls": len(ordered)}


# --- No waiting for the device --------------------------------------------------------------


def sync(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Whether our calls stay silent where any wait for the device raises.

    step() lets no exception out, so what it recorded is counted too: a step that raised inside
    is not in the journal. That the mode is on is shown by an .item(), which has to raise.
    """
    if args.device != "cuda":
        return {"skipped": "sync debug mode exists on CUDA alone"}
    work, steps = QueuedWork(args.device), 200
    with _observed("sync", scratch, work.model, optimizer=work.optimizer):
        for step in range(1, steps + 1):
            loss = work.step()
            with _no_sync():
                obs.step(step, loss=loss, tokens=TOKENS, grad_norm=loss)
                obs.log({"seen": loss}, step=step)
        with _no_sync():
            mode_is_on = _raises(lambda: work.step().item())
    records = list(obs.read_run(scratch / "out" / "sync"))
    recorded = sum("loss/train" in r["metrics"] and "grad_norm" in r["metrics"] for r in records)
    logged = sum("seen" in r["metrics"] for r in records)
    silent = mode_is_on and recorded == steps and logged == steps
    return {
        "silent": silent,
        "mode_is_on": mode_is_on,
        "steps": steps,
        "recorded": recorded,
        "logged": logged,
    }


@contextlib.contextmanager
def _no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError:
        return True
    return False


# --- The reference recipe -------------------------------------------------------------------


def recipe(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Wall time of an observed stretch over the mean of the unobserved ones before and after it.

    A steady drift of the clock cancels in that. `control` is the second of those over the first:
    what the machine does by itself. The hook on the optimizer that notes the learning rate, a
    microsecond, stays on in all of them.
    """
    loop, steps = Recipe(args.device), args.steps
    rounds: list[tuple[float, float, float]] = []
    with _observed(
        "recipe", scratch, loop.model, optimizer=loop.optimizer, scheduler=loop.scheduler
    ):
        for observe in (False, True):
            loop.run(max(5, steps // 5), observe)
        for _ in range(args.rounds):
            before, observed, after = (loop.run(steps, observe) for observe in (False, True, False))
            rounds.append((before, observed, after))
    return {
        "ratio": _ratios([observed / ((before + after) / 2) for before, observed, after in rounds]),
        "control": _ratios([after / before for before, _, after in rounds]),
        "unobserved_ms": statistics.median(before for before, _, _ in rounds) / steps * 1e3,
        "observed_ms": statistics.median(observed for _, observed, _ in rounds) / steps * 1e3,
        "rounds": args.rounds,
        "steps": steps,
        "parameters": sum(p.numel() for p in loop.model.parameters()),
    }


def _ratios(ratios: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "all": ratios,
    }


class Recipe:
    """The reference loop on random ids: the model, optimizer, clip and loss.item() of train.py."""

    def __init__(self, device: str) -> None:
        train = _import_train()
        # On a CPU only the logic is tried, and the full model would take minutes.
        self.args = train.FULL if device == "cuda" else replace(train.SMALL, vocab_size=500)
        self.device, self.next_batch = device, train.next_batch
        torch.manual_seed(self.args.seed)
        self.model = train.GPT(self.args.vocab_size, self.args).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.lr)
        schedulers = torch.optim.lr_scheduler
        self.scheduler = schedulers.CosineAnnealingLR(self.optimizer, T_max=100_000)
        span = self.args.batch_size * self.args.block_size
        self.ids = torch.randint(self.args.vocab_size, (20 * span + 1,), device=device)
        self.ptr = self.done = 0

    def run(self, steps: int, observe: bool) -> float:
        """Seconds for so many steps, from an idle device to an idle device."""
        _wait(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.done += 1
            loss, tokens = self.step()
            loss.item()  # the recipe logs every loss; that wait is the script's own
            if observe:
                obs.step(self.done, loss=loss, tokens=tokens)
        _wait(self.device)
        return time.perf_counter() - begin

    def step(self) -> tuple[Tensor, int]:
        xb, yb, self.ptr = self.next_batch(self.ids, self.ptr, self.args)
        logits = self.model(xb)
        loss = F.cross_entropy(logits.flatten(0, 1), yb.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss, xb.numel()


def _import_train() -> Any:
    """mainrun/train.py; what it needs for its data and its log alone may be missing here."""
    for name in ("structlog", "tokenizers", "tqdm"):
        if importlib.util.find_spec(name) is None:
            absent = types.ModuleType(name)
            absent.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
            sys.modules[name] = absent
    import train

    return train


if __name__ == "__main__":
    main()
