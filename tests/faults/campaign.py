"""Kill a small training again and again: each time it must go on to the same last digit.

    python tests/faults/campaign.py --kills 300 --chain 20 --seed 1

Kills come at random instants. While too few have hit a save or a resume, the next is aimed: it
waits for a save's `.tmp-…` directory to have so many files, or for a resume to begin. After each,
`verify` must hold and nothing that was said to be saved be gone; the resumed run must end in the
bits of one never killed, and TensorBoard's own reader must see one curve.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "mainrun"))
import observability as obs
import observability_tools as tools

FILES = ("model.pth", "optimizer.pt", "rng_state.pt", "run_manifest.json", "state.json")


# --- The training ---------------------------------------------------------------------------------


def train(folder: Path, epochs: int) -> None:
    """The reference model, made small, and a loop with all that a resume must put back."""
    from train import GPT, Hyperparameters  # here, for the parent needs none of it

    sys.stderr = (folder / "said").open("a", buffering=1)
    torch.set_num_threads(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    args = Hyperparameters(block_size=32, n_layer=2, n_head=2, d_model=32, dropout=0.1)
    model = GPT(100, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24 * epochs)
    texts = torch.randint(100, (8 * 24, 33))
    loader = DataLoader(TensorDataset(texts), 8, shuffle=True)

    under_way = folder / "resuming"
    under_way.touch()
    obs.init(
        "run",
        out_dir=folder / "out",
        tb_dir=folder / "tb",
        weights=folder / "weights.pth",
        resume="auto",
        save_interval="4",
        keep_last=2,
        plot_interval=0,
        drain_interval=0.02,
    )
    obs.watch(model, optimizer=optimizer, scheduler=scheduler)
    step, smooth = obs.resume(step=0, smooth=torch.zeros(()))
    under_way.unlink()
    for epoch in range(epochs):
        if obs.skip_epoch(epoch):
            continue
        for (batch,) in loader:
            if obs.skip_batch():
                continue
            step += 1
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            smooth = 0.9 * smooth + 0.1 * loss.detach()
            obs.step(step, loss=loss, smooth=smooth)
        obs.validation(loss_of(model.eval(), texts[:32]).detach())
        model.train()
    obs.finish()


def loss_of(model: nn.Module, texts: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())


# --- How it stands --------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """What must hold right after a kill."""
    for run_dir in runs(folder):
        damage = tools.verify(run_dir)["damage"]
        assert not damage, f"verify finds {damage}"
        said = [
            r["tags"]["checkpoint"]
            for r in obs.read_run(run_dir)
            if r["tags"].get("event") == "saved"
        ]
        saved = max((int(name[5:]) for name in said), default=0)
        assert newest_step(run_dir / "checkpoints") >= saved, f"step {saved} is gone"


def check_end(folder: Path, expected: dict[str, Any]) -> None:
    check(folder)
    got = ending(folder)
    other = [name for name in expected if got[name] != expected[name]]
    rows = sorted(set(got["journal"]) ^ set(expected["journal"]))
    assert not other, f"{', '.join(other)} differ; rows of the journal: {rows[:4]}"
    known = ("start at step", "resume at step", "completed at step", "holds no checkpoint")
    known += ("holds another run", "the loss jumps")  # after three losses the next may be well out
    said = (folder / "said").read_text().splitlines()
    strange = [line for line in said if not any(words in line for words in known)]
    assert not strange, f"it says {strange[0]!r}"
    last = runs(folder)[-1]
    for tag in ("loss/train", "smooth", "loss/val_step", "loss/val"):
        shown = curve(folder / "tb" / last.name, tag)
        assert shown == points(last, tag), f"TensorBoard's {tag} is another: {shown}"


def curve(events: Path, tag: str) -> list[tuple[int, float]]:
    """As TensorBoard's own reader sees it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each START
    reader = EventAccumulator(str(events), size_guidance={"scalars": 0})
    reader.Reload()
    return [(point.step, point.value) for point in reader.Scalars(tag)]


def points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [
        (record["tags"].get("epoch", record["step"]), float(np.float32(record["metrics"][tag])))
        for record in obs.read_run(run_dir)
        if tag in record["metrics"]
    ]


def ending(folder: Path) -> dict[str, Any]:
    """All that must be the same: every number of the journal, and the state in its bits."""
    last = runs(folder)[-1]
    rows = [
        (record["step"], name, float(value).hex())
        for record in obs.read_run(last)
        for name, value in record["metrics"].items()
        if not name.startswith(("speed/", "system/"))
    ]
    saved = obs.latest_ckpt(last / "checkpoints")
    files = {name: (saved / name).read_bytes() for name in FILES[:2]}
    files["weights.pth"] = (folder / "weights.pth").read_bytes()
    return {"journal": rows, "generators": plain(torch.load(saved / FILES[2])), **files}


def plain(tree: Any) -> Any:
    """Its numbers, whether one object stands in it once or twice."""
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return tree.tolist() if isinstance(tree, torch.Tensor) else tree


def runs(folder: Path) -> list[Path]:
    """The oldest first: a run that was killed before its first save begins anew beside it."""
    begun = [path.parent for path in folder.glob("out/*/metrics.ndjson")]
    return sorted(begun, key=lambda path: (len(path.name), path.name))


def newest_step(directory: Path) -> int:
    path = obs.latest_ckpt(directory)
    return 0 if path is None else int(path.name[5:])


# --- Kills ----------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """When to kill: so long after the start, or after that save has come to so many files, or after
    the beginning of a resume."""

    delay: float
    save: int = 0
    files: int = 0
    resume: bool = False

    def kill(self, process: Any, folder: Path) -> bool:
        """Whether it came in time."""
        known = {step_of(path) for path in folder.glob("out/*/checkpoints/*step_*")}
        begun, new = 0, set[Path]()
        while process.is_alive() and self.resume and not (folder / "resuming").exists():
            time.sleep(0.0002)
        while process.is_alive() and (
            begun < self.save or any(files_in(path) < self.files for path in new)
        ):
            time.sleep(0.0005)  # a save takes ten milliseconds and more
            if found := {path for path in staged(folder) if step_of(path) not in known}:
                begun, new = begun + 1, found
                known |= {step_of(path) for path in found}  # it has this name when removed, too
        process.join(self.delay)
        process.kill()
        process.join()
        return bool(process.exitcode == -signal.SIGKILL)


def staged(folder: Path) -> set[Path]:
    """What a save has under way, or a killed one has left."""
    return set(folder.glob("out/*/checkpoints/.tmp-step_*"))


def step_of(path: Path) -> str:
    return path.name.removeprefix(".tmp-")[: len("step_00000000")]


def files_in(path: Path) -> int:
    return len([*path.glob("*")]) if path.exists() else len(FILES)  # it has its name by now


class Campaign:
    """Kills, and what came of them; a folder in which something broke is kept."""

    def __init__(self, folder: Path, seed: int) -> None:
        from conftest import forks  # here, for it needs pytest, and the children none of it

        self.folder, self.draw, self.context = folder, random.Random(seed), forks()
        self.kills = 0
        self.torn: Counter[int] = Counter()  # saves that were hit, by the files that they had
        self.resumes = 0  # that were hit
        self.failures: list[str] = []
        self._began = time.monotonic()

    def run(self, runs: int, in_a_row: int = 1, epochs: int = 2) -> None:
        """So many runs, each killed so many times and then left to its end."""
        self.epochs, began = epochs, time.monotonic()
        straight = self.folder / f"straight{in_a_row}_{epochs}"
        self.start(straight).join()
        expected, length = ending(straight), time.monotonic() - began
        for number in range(1, runs + 1):
            folder = self.folder / f"run{number}_{in_a_row}_{epochs}"
            try:
                self.kill(folder, in_a_row, length / in_a_row)
                self.start(folder).join()
                check_end(folder, expected)
                shutil.rmtree(folder)
            except Exception as error:  # of the drop-in, which is on trial here
                self.failures.append(f"{folder}: {error!r}")
                print(self.failures[-1], flush=True)

    def start(self, folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        process = self.context.Process(target=train, args=(folder, self.epochs))
        process.start()
        return process

    def kill(self, folder: Path, in_a_row: int, seconds: float) -> None:
        done = 0
        while done < in_a_row:
            (folder / "resuming").unlink(missing_ok=True)
            has_saved = any(folder.glob("out/*/checkpoints/step_*"))
            old, moment = staged(folder), self.moment(seconds, has_saved, in_a_row)
            if not moment.kill(self.start(folder), folder):  # it came to its end first
                shutil.rmtree(folder)
                done = 0
                continue
            self.kills, done = self.kills + 1, done + 1
            self.torn.update(map(files_in, staged(folder) - old))
            self.resumes += has_saved and (folder / "resuming").exists()
            if self.kills % 10 == 0:
                print(self, flush=True)
            check(folder)

    def moment(self, seconds: float, has_saved: bool, in_a_row: int) -> Moment:
        """At random; while too few were inside a save or a resume, there."""
        if 5 * (self.torn.total() + self.resumes) > 3 * self.kills:
            return Moment(self.draw.uniform(0, seconds))
        if has_saved and self.draw.random() < 0.5:
            return Moment(self.draw.uniform(0, 0.03), resume=True)
        last = 1 if in_a_row > 3 else 3  # or a row would be at its end too soon
        return Moment(
            self.draw.uniform(0, 0.003), self.draw.randint(1, last), self.draw.randrange(len(FILES))
        )

    def __str__(self) -> str:
        took = time.monotonic() - self._began
        return (
            f"{self.kills:4d} kills, {self.torn.total():4d} inside a save, "
            f"{self.resumes:3d} inside a resume, {len(self.failures)} failures, {took:.0f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a small training again and again.")
    parser.add_argument("--kills", type=int, default=300, help="three of each run")
    parser.add_argument("--chain", type=int, default=20, help="kills in a row of one run")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {options.seed}, in {folder}", flush=True)
    campaign = Campaign(folder, options.seed)
    campaign.run(1, in_a_row=options.chain, epochs=16)
    campaign.run(-(-options.kills // 3), in_a_row=3)
    files = ", ".join(f"{count} with {n}" for n, count in sorted(campaign.torn.items()))
    print(f"in all: {campaign}\nthe saves that were hit had files: {files}")
    if 2 * (campaign.torn.total() + campaign.resumes) < campaign.kills:
        print("fewer than half of the kills were inside a save or a resume")
        return 1
    if campaign.failures:
        print(f"what broke is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
