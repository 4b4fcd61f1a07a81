"""A run that is killed goes on to the same last digit, and its curve is one curve."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAINRUN, forks, python, read_json
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import observability as obs
import observability_tools as tools
from tests.recipe.test_proof import run_scripts, same_bits, unobserved, write_scripts  # noqa: F401

SIZE = 20  # items; five batches


class Noisy(Dataset):
    """Each item is drawn anew from all three generators, as augmentations are."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.rand(6) + float(np.random.rand()) + random.random()
        return noise * 0.1 + index / SIZE


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(SIZE):
            yield torch.rand(6) + index / SIZE


class OwnState:
    """A loader that comes back to its place by itself."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            yield torch.full((4, 6), self.at / 5)
        self.at = 0

    def __len__(self) -> int:
        return 5

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Script:
    """One training script of the kind named; `step` ends an iteration as a call site does."""

    def __init__(self, kind: str, losses: Path, kill_at: int) -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        self.kind, self.losses, self.kill_at = kind, losses, kill_at
        self.model = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)
        )
        half = [*self.model[0].parameters()], [*self.model[4].parameters()]
        if kind == "lbfgs":
            self.optimizers = [torch.optim.LBFGS(self.model.parameters(), max_iter=3)]
        elif kind == "accumulate":  # two optimizers as well
            self.optimizers = [torch.optim.AdamW(half[0]), torch.optim.SGD(half[1], 0.1, 0.9)]
        else:
            self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=0.01)]
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizers[0], 1, 0.7)
        self.device = "cuda" if kind == "cuda" else "cpu"
        self.model.to(self.device)
        self.scaler = torch.amp.GradScaler(
            self.device, enabled=kind in ("scaler", "cuda"), growth_interval=2
        )
        workers = {"num_workers": 2} if kind == "workers" else {}
        self.loader: Any = DataLoader(Noisy(), 4, shuffle=True, **workers)
        if kind == "iterable":
            self.loader = DataLoader(Stream(), 4)
        elif kind == "own state":
            self.loader = OwnState()
        obs.watch(
            self.model,
            optimizer=self.optimizers,
            scheduler=self.scheduler,
            scaler=self.scaler,
            loader=self.loader,
        )

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(self.device)
        target = batch.sum(1, keepdim=True)
        if self.scaler.is_enabled():
            with torch.autocast(self.device, torch.bfloat16):
                return F.mse_loss(self.model(batch).float(), target)
        return F.mse_loss(self.model(batch), target)

    def update(self, batch: torch.Tensor) -> torch.Tensor:
        if self.kind == "lbfgs":
            return self.optimizers[0].step(lambda: self.backward(batch, clear=True))
        loss = self.backward(batch, clear=True)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss

    def backward(self, batch: torch.Tensor, *, clear: bool) -> torch.Tensor:
        if clear:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        loss = self.forward(batch)
        self.scaler.scale(loss).backward()
        return loss

    def done(self, step: int, loss: torch.Tensor, last: bool = False, **carry: Any) -> None:
        with self.losses.open("a") as file:
            file.write(f"{step} {loss.item().hex()}\n")
        obs.step(step, loss=loss, carry={"step": step, **carry}, last=last)
        if step == self.kill_at:
            obs.current_run().settle()
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self) -> None:
        loops = {
            "accumulate": self.accumulate,
            "while": self.while_true,
            "full": self.full_batch,
            "one pass": self.one_pass,
            "capped": self.capped,
            "capped while": self.capped_while,
        }
        loops.get(self.kind, self.epochs)()

    def epochs(self) -> None:
        step = obs.resume(step=0)
        for epoch in range(3):
            if obs.skip_epoch(epoch):
                continue
            for batch in self.loader:
                if obs.skip_batch():
                    continue
                step += 1
                loss = self.update(batch)
                self.done(step, loss)
            self.scheduler.step()
            torch.rand(epoch + 1)  # the epoch's own tail draws too

    def accumulate(self) -> None:
        step = obs.resume(step=0)
        for epoch in range(3):
            if obs.skip_epoch(epoch):
                continue
            for index, batch in enumerate(self.loader):
                if obs.skip_batch():
                    continue
                loss = self.backward(batch, clear=index % 2 == 0)
                if index % 2 == 1 or index == 4:
                    step += 1
                    for optimizer in self.optimizers:
                        optimizer.step()
                    self.done(step, loss)

    def while_true(self) -> None:
        batch, history = torch.rand(4, 6), {"all": [0.0]}  # the first batch is fetched ahead
        step, batch, history = obs.resume(step=0, batch=batch, history=history)
        while True:
            if step >= 12:
                break
            loss = self.update(batch)
            batch = torch.rand(4, 6)
            history["all"].append(loss.item())
            step += 1
            self.done(step, loss, batch=batch, history=history)
        assert len(history["all"]) == 13

    def full_batch(self) -> None:
        for step in range(1, 8):
            if step == 1:
                obs.resume()
            if obs.skip_epoch(step):
                continue
            loss = self.update(torch.rand(20, 6))
            self.done(step, loss)

    def one_pass(self) -> None:
        step = obs.resume(step=0)
        for batch in self.loader:
            if obs.skip_batch():
                continue
            step += 1
            self.done(step, self.update(batch))

    def capped(self) -> None:
        """Left in the midst of the second epoch, and at the first batch of the third."""
        step = obs.resume(step=0)
        for epoch in range(3):
            if obs.skip_epoch(epoch):
                continue
            for batch in self.loader:
                if obs.ended():
                    break
                if obs.skip_batch():
                    continue
                step += 1
                self.done(step, self.update(batch), last=step >= 7)
                if step >= 7:
                    break
            torch.rand(epoch + 1)

    def capped_while(self) -> None:
        step = obs.resume(step=0)
        while True:
            if obs.ended():
                break
            step += 1
            self.done(step, self.update(torch.rand(4, 6)), last=step >= 7)
            if step >= 7:
                break
        torch.rand(1)


def train(kind: str, folder: Path, kill_at: int = 0, **settings: Any) -> None:
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    settings = {"save_interval": "1", "system_interval": 0, "resume": "auto", **settings}
    obs.init("run", out_dir=folder / "out", tb_dir=folder / "tb", **settings)
    script = Script(kind, folder / "losses", kill_at)
    script.run()
    obs.finish()
    rng = obs.rng_state(())
    states = [optimizer.state_dict() for optimizer in script.optimizers]
    torch.save([script.model.state_dict(), states, rng], folder / "ended")


@pytest.fixture(scope="module")
def process():
    """Start `train` in a fork of a process that has torch already."""
    context = forks()

    def run(*arguments: Any, **settings: Any) -> int:
        started = context.Process(target=train, args=arguments, kwargs=settings)
        started.start()
        started.join(120)
        return started.exitcode

    return run


def losses_of(path: Path) -> dict[int, str]:
    """By step; a step that was done twice came out the same."""
    losses: dict[int, str] = {}
    for line in path.read_text().splitlines():
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"step {step}"
    return losses


def ended(folder: Path) -> Any:
    return torch.load(folder / "ended", weights_only=False)


KINDS = [
    "plain",
    "workers",
    "accumulate",
    "lbfgs",
    "scaler",
    "iterable",
    "own state",
    "while",
    "full",
    "one pass",
    "capped",
    "capped while",
    *(["cuda"] if torch.cuda.is_available() else []),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_after_every_step_ends_in_the_same_digits(tmp_path, process, kind):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert process(kind, straight) == 0
    expected = losses_of(straight / "losses")
    # 5 and 10 end an epoch.
    stride = {"plain": 1, "capped": 1, "workers": 4, "cuda": 4}.get(kind, 3)
    for kill_at in range(1, max(expected) + 1, stride):
        assert process(kind, killed, kill_at) == -signal.SIGKILL
    assert process(kind, killed) == 0
    assert losses_of(killed / "losses") == expected
    assert same_bits(ended(killed), ended(straight))
    # The one that came to its end: a kill before the first checkpoint leaves a run behind.
    [run_dir] = [path.parent for path in killed.glob("out/*/results.json")]
    journal = [
        (r["step"], r["metrics"]["loss/train"])
        for r in obs.read_run(run_dir)
        if "loss/train" in r["metrics"]
    ]
    assert journal == [(n, float.fromhex(loss)) for n, loss in expected.items()]
    assert tools.verify(run_dir)["damage"] == []


# --- The reference script -------------------------------------------------------------------------


def start(folder: Path, attempt: int, **environment: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "LOG": str(folder / f"log{attempt}"),
        "DEVICE": "cpu",
        "OBS_RESUME": "auto",
        "SAVE_INTERVAL": "4",
        "OBS_SYSTEM_INTERVAL": "0",
        **environment,
    }
    command = [sys.executable, str(folder / "scripts/run.py"), str(folder / "ended")]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def logged(path: Path) -> list[tuple[str, int, float]]:
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # torn by the kill
            break
    return [(line["event"], line["step"], line["loss"]) for line in lines if "loss" in line]


def test_the_reference_script_killed_at_random_steps_ends_in_the_same_digits(tmp_path, unobserved):  # noqa: F811
    write_scripts(tmp_path / "scripts", observed=True)
    expected, draw, seen = unobserved["cpu"][0], random.Random(5), set()
    out = tmp_path / "scripts/out"
    for attempt in range(5):
        running = start(tmp_path, attempt)
        log, wanted = tmp_path / f"log{attempt}", draw.randrange(8, 20)
        while (
            running.poll() is None
            and attempt < 4
            and not (len(logged(log)) >= wanted and any(out.glob("*/checkpoints/step_*")))
        ):
            time.sleep(0.005)
        running.kill() if attempt < 4 else None
        said = running.communicate()[1]
        seen |= set(logged(log))
    assert running.returncode == 0, said
    assert len(logged(tmp_path / "log4")) < len(expected)
    assert seen == set(expected)
    assert same_bits(torch.load(tmp_path / "ended", weights_only=False), unobserved["cpu"][1])
    *_, run_dir = sorted((tmp_path / "scripts/out").iterdir())  # a kill may come before a save
    curve = [
        (r["step"], r["metrics"]["loss/train"])
        for r in obs.read_run(run_dir)
        if "loss/train" in r["metrics"]
    ]
    assert curve == [(step, loss) for event, step, loss in expected if event == "training_step"]
    points = [
        (r["step"], r["metrics"]["loss/val_step"])
        for r in obs.read_run(run_dir)
        if "loss/val_step" in r["metrics"]
    ]
    assert points == [(step, loss) for event, step, loss in expected if "validation" in event]
    epochs = [r["tags"]["epoch"] for r in obs.read_run(run_dir) if "loss/val" in r["metrics"]]
    assert epochs == [1, 2, 3]
    assert tools.verify(run_dir)["damage"] == []


def test_tensorboard_shows_one_curve_after_a_resume(tmp_path, process):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = tmp_path / "killed"
    process("plain", killed, 9, save_interval="4")
    assert process("plain", killed, save_interval="4") == 0
    [directory] = (killed / "tb").iterdir()
    assert len(list(directory.iterdir())) == 2
    events = EventAccumulator(str(directory))
    events.Reload()
    journal = [
        (r["step"], r["metrics"]["loss/train"])
        for r in obs.read_run(killed / "out/run")
        if "loss/train" in r["metrics"]
    ]
    assert [step for step, _ in journal] == list(range(1, 16))
    shown = [(e.step, e.value) for e in events.Scalars("loss/train")]
    assert shown == [(step, pytest.approx(loss)) for step, loss in journal]
    [resumed] = [r for r in obs.read_run(killed / "out/run") if r["tags"].get("event") == "resume"]
    assert resumed["step"] in (4, 8)  # the second may have come while the first was written
    assert resumed["tags"]["checkpoint"] == f"step_{resumed['step']:08d}"


def interrupted() -> int:
    """The status of a script that Ctrl-C ends: with some versions of torch it is 1, not -2."""
    return python(
        "-c",
        "import torch, tqdm, structlog\n"
        "torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()\n"
        "raise KeyboardInterrupt",
    ).returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_ends_the_script_as_it_would_have(tmp_path, number, unobserved):  # noqa: F811
    write_scripts(tmp_path / "scripts", observed=True)
    running = start(tmp_path, 0, SAVE_INTERVAL="1000")
    while len(logged(tmp_path / "log0")) < 10:
        time.sleep(0.005)
    running.send_signal(number)
    said = running.communicate()[1]
    assert running.returncode == (-number if number == signal.SIGTERM else interrupted())
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    [run_dir] = (tmp_path / "scripts/out").iterdir()
    saved = obs.latest_ckpt(run_dir / "checkpoints")
    last = max(step for _, step, _ in logged(tmp_path / "log0"))
    assert obs.read_state(saved)["global_step"] == last
    assert start(tmp_path, 1).communicate()[1] is not None
    assert set(logged(tmp_path / "log0") + logged(tmp_path / "log1")) == set(unobserved["cpu"][0])
    assert same_bits(torch.load(tmp_path / "ended", weights_only=False), unobserved["cpu"][1])


def test_a_script_that_handles_the_signal_itself_goes_on_and_is_saved_as_before(
    open_run, run_dir, tiny_model
):
    model, optimizer = tiny_model[:2]
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        run = open_run(save_interval="3")
        obs.watch(model, optimizer=optimizer)
        for step in range(1, 7):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            obs.step(step, loss=1.0)
            assert noted == [signal.SIGTERM] * (step >= 2)
            run.settle()
        assert saved_steps(run_dir / "checkpoints") == [2, 3, 6]
    finally:
        signal.signal(signal.SIGTERM, before)


# --- What is not as it was ------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
    """A run with a checkpoint at step 3, and how to open it again."""
    obs._said.clear()

    def init(width: int = 2, steps: int = 0, **settings: Any) -> Any:
        settings = {"system_interval": 0, "save_interval": "1", **settings}
        run = obs.init("run", out_dir=tmp_path / "out", tb_dir=tmp_path / "tb", **settings)
        model = nn.Linear(width, 1)
        obs.watch(model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
        for step in range(1, steps + 1):
            obs.step(step, loss=1.0, carry={"step": step, "rest": torch.ones(2)})
            run.settle()
        return run

    init(steps=3, config={"lr": 0.1, "old": 1})
    obs.current_run().recorder.drain()
    obs.finish("failed: killed")
    yield init
    obs.finish()


def test_resume_returns_what_was_carried_in_the_order_asked_for(opened):
    run = opened(resume="auto")
    rest, step = obs.resume(rest=None, step=0)
    assert (step, rest.tolist(), run.global_step) == (3, [1.0, 1.0], 3)


def test_a_local_has_its_saved_value_back_once_and_is_as_given_from_then_on(opened):
    opened(resume="auto")
    assert obs.resume(step=0) == 3
    assert obs.resume(step=7) == 7
    rest, step = obs.resume(rest=None, step=8)
    assert (rest.tolist(), step) == ([1.0, 1.0], 8)


def test_what_an_epoch_gives_to_resume_is_saved_until_a_step_carries_it(opened):
    run = opened(resume="auto")
    obs.skip_epoch(1)
    obs.resume(step=0, rest=None)
    obs.resume(rest=torch.zeros(2))
    obs.step(4, loss=1.0, carry={"step": 4})
    obs.save()
    obs.finish()
    (run.dir / "results.json").unlink()  # as if it had been killed at its end
    opened(resume="auto")
    obs.skip_epoch(1)
    rest, step = obs.resume(rest=None, step=0)
    assert (rest.tolist(), step) == ([0.0, 0.0], 4)


def test_skip_epoch_puts_everything_back_where_resume_is_not_called_before(opened):
    run = opened(resume="auto")
    assert obs.skip_epoch() is False
    assert run.global_step == 3
    assert obs.resume(step=0) == 3


def test_skip_epoch_says_what_resume_would_of_another_model(opened):
    opened(width=3, resume="auto")
    with pytest.raises(obs.CheckpointError, match=r"weight \(1, 2\), \(1, 3\)"):
        obs.skip_epoch(1)


def test_an_evaluation_after_the_checkpoint_of_its_step_is_recorded_once(open_run, tiny_model):
    """It is made again by the resumed run, which ends the epoch that the checkpoint is of."""
    model, optimizer = tiny_model
    for attempt in range(3):
        run = open_run("run", save_interval=1, resume="auto")
        obs.watch(model, optimizer=optimizer)
        step = obs.resume(step=0)
        assert step == (0 if attempt == 0 else 2)
        for epoch in range(2):
            if obs.skip_epoch(epoch):
                continue
            for _ in range(2):
                if obs.skip_batch():
                    continue
                step += 1
                obs.step(step, loss=1.0, carry={"step": step})
                run.settle()
            obs.validation(2.0 + epoch)
            if attempt < 2:
                break
        obs.finish("failed: as by a kill")
    evaluations = [
        (r["step"], r["metrics"]["loss/val_step"])
        for r in obs.read_run(run.dir)
        if "loss/val_step" in r["metrics"]
    ]
    assert evaluations == [(2, 2.0), (4, 3.0)]


def test_without_a_checkpoint_resume_returns_what_it_was_given(tmp_path, open_run):
    assert obs.resume(ptr=1, step=2) == (1, 2)
    open_run(resume="auto")
    assert obs.resume(ptr=1, step=2) == (1, 2)
    assert obs.resume(ptr=1) == 1


def test_never_is_the_default_and_begins_another_run(opened, tmp_path):
    opened()
    assert obs.resume(step=0) == 0
    assert (tmp_path / "out/run-2").is_dir()


@pytest.mark.parametrize(
    ("path", "step", "name"),
    [
        ("out/run", 3, "run"),
        ("out/run/checkpoints", 3, "run-2"),
        ("out/run/checkpoints/step_00000002", 2, "run-2"),
    ],
)
def test_a_path_names_a_run_to_go_on_in_or_a_checkpoint_to_fork_from(
    opened, tmp_path, path, step, name
):
    run = opened(resume=str(tmp_path / path))
    assert (obs.resume(step=0), run.name) == (step, name)


def test_a_path_without_a_checkpoint_is_an_error_of_resume_alone(opened, tmp_path):
    opened(resume=str(tmp_path / "absent"))
    with pytest.raises(obs.CheckpointError, match="absent holds no checkpoint"):
        obs.resume(step=0)


def test_other_hyperparameters_and_flags_are_each_named(opened, capfd):
    opened(resume="auto", config={"lr": 0.2, "new": 1})
    try:
        torch.use_deterministic_algorithms(True)
        obs.resume(step=0)
    finally:
        torch.use_deterministic_algorithms(False)
    said = capfd.readouterr().err
    for words in (
        "lr was 0.1, is 0.2",
        "old was 1, is None",
        "new was None, is 1",
        "deterministic was False, is True",
    ):
        assert words in said
    assert "torch was" not in said


def test_another_model_is_an_error_that_names_what_differs(opened):
    opened(width=3, resume="auto")
    with pytest.raises(obs.CheckpointError, match=r"weight \(1, 2\), \(1, 3\)"):
        obs.resume(step=0)


def test_a_local_that_was_not_carried_is_an_error_that_says_where_to_add_it(opened):
    opened(resume="auto")
    with pytest.raises(obs.CheckpointError, match=r"give step\(\) carry=\{'ptr': ptr\}"):
        obs.resume(step=0, ptr=0)


@pytest.mark.parametrize(
    ("loss", "said"), [(1.0, ""), (7.5, "7.5 at step 4, 1 before"), (float("nan"), "nan at step 4")]
)
def test_a_loss_that_jumps_is_said_with_both_numbers(opened, capfd, loss, said):
    opened(resume="auto")
    obs.resume(step=0)
    obs.step(4, loss=loss)
    obs.finish()
    err = capfd.readouterr().err
    assert said in err
    assert ("the loss jumps" in err) == (loss != 1.0)


def test_resume_publishes_the_weights_that_a_kill_has_held_back(opened, tmp_path):
    """It may come between a checkpoint's commit and the plain weights file."""
    opened(resume="auto", weights=tmp_path / "weights.pth")
    obs.resume(step=0)
    saved = tmp_path / "out/run/checkpoints/step_00000003/model.pth"
    assert (tmp_path / "weights.pth").read_bytes() == saved.read_bytes()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(opened, tmp_path, capfd):
    weights = tmp_path / "out/run/checkpoints/step_00000003/model.pth"
    weights.write_bytes(weights.read_bytes()[:-1])
    opened(resume="auto")
    assert obs.resume(step=0) == 2
    assert "step_00000003 is damaged" in capfd.readouterr().err


# --- Settings -------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def test_checkpoints_come_at_the_interval_and_at_the_end_and_the_last_are_kept(
    open_run, run_dir, tmp_path, monkeypatch, tiny_model
):
    monkeypatch.setenv("SAVE_INTERVAL", "2")
    monkeypatch.setenv("KEEP_LAST", "2")
    run = open_run(weights=str(tmp_path / "out/pretrain_512.pth"))
    obs.watch(tiny_model[0], optimizer=tiny_model[1])
    for step in range(1, 10):
        tiny_model[1].step()
        if step == 3:
            obs.validation(0.5)
        obs.step(step, loss=1.0)
        run.settle()
    assert saved_steps(run_dir / "checkpoints") == [3, 6, 8]  # the best, and the last two
    obs.finish()
    assert saved_steps(run_dir / "checkpoints") == [3, 8, 9]
    assert read_json(run_dir / "results.json")["best_checkpoint"].endswith("step_00000003")
    weights = torch.load(tmp_path / "out/pretrain_512.pth", weights_only=True)
    assert same_bits(dict(weights), dict(tiny_model[0].state_dict()))


def test_without_an_interval_nothing_is_saved_but_what_save_asks_for(open_run, run_dir, tiny_model):
    open_run()
    obs.watch(tiny_model[0], optimizer=tiny_model[1])
    obs.step(1, loss=1.0)
    assert not (run_dir / "checkpoints").exists()
    obs.save()
    obs.step(2, loss=1.0)
    obs.step(3, loss=1.0)
    obs.current_run().settle()
    assert saved_steps(run_dir / "checkpoints") == [2]


def test_auto_keeps_the_cost_of_saving_under_half_a_percent(monkeypatch):
    policy = obs.SavePolicy("auto")
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    policy.saved(8, 99.8, 0.2)  # a fifth of a second in the loop, another behind it
    due = []
    for now in (110.0, 179.0, 180.5):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        due.append(policy.due(9))
    assert due == [False, False, True]


def test_state_json_says_where_and_with_what(opened, tmp_path):
    state = obs.read_state(tmp_path / "out/run/checkpoints/step_00000003")
    assert {
        "epoch",
        "step_in_epoch",
        "global_step",
        "hyperparameters",
        "loss_history",
        "python",
        "torch",
        "device",
        "deterministic",
        "cudnn_benchmark",
        "threads",
    } <= set(state)
    assert state["hyperparameters"] == {"lr": 0.1, "old": 1}
    assert state["loss_history"] == [[1, 1.0], [2, 1.0], [3, 1.0]]


def test_the_arguments_of_the_command_line_are_settings(monkeypatch):
    import argparse

    monkeypatch.setattr(obs, "_from_arguments", {})
    parser = argparse.ArgumentParser()
    obs.add_arguments(parser)
    parser.parse_args([])
    assert obs.resolve_settings({})[1].resume == "never"
    parser.parse_args(
        [
            "--resume",
            "--ckpt_dir",
            "there",
            "--keep_last_checkpoints",
            "7",
            "--save_interval",
            "auto",
        ]
    )
    settings = obs.resolve_settings({})[1]
    assert (settings.resume, settings.ckpt_dir) == ("auto", "there")
    assert (settings.keep_last, settings.save_interval) == (7, "auto")


# --- verify ---------------------------------------------------------------------------------------


def verify(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, MAINRUN / "observability.py", "verify", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


@pytest.mark.parametrize(
    "name", ["checkpoints/step_00000002/optimizer.pt", "metrics.ndjson", "events"]
)
def test_verify_finds_a_flipped_bit(opened, tmp_path, name):
    run_dir = tmp_path / "out/run"
    done = verify(run_dir, "--json")
    assert (done.returncode, json.loads(done.stdout)[0]["damage"]) == (0, [])
    [events] = (tmp_path / "tb").glob("*/events*")
    file = events if name == "events" else run_dir / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2 - 20] ^= 128
    file.write_bytes(data)
    done = verify(run_dir)
    assert done.returncode == 1
    assert str(file.name) in done.stdout


def test_verify_finds_a_bit_that_flips_in_the_keys_of_a_record(opened, tmp_path):
    obs.finish()
    journal = tmp_path / "out/run/metrics.ndjson"
    whole = journal.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for key in (b"schema", b"seq", b"time", b"step", b"metrics", b"tags"):
        data = bytearray(whole)
        data[whole.index(key, last)] ^= 1
        journal.write_bytes(data)
        assert "metrics.ndjson" in tools.verify(tmp_path / "out/run")["damage"][-1]


def test_verify_of_no_run_cannot_answer(tmp_path):
    assert verify(tmp_path).returncode == 2
    shutil.rmtree(tmp_path)
    assert verify(tmp_path).returncode == 2
