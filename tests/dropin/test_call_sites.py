"""A resume is exact and nothing is said, or what it would miss is said with the line to add.

Each case is a whole script in a folder of its own: one of tests/call_sites, or its plain.py with a
few lines edited. It is run to its end; and twice it is killed in the middle of two optimizer steps,
by SIGTERM and by SIGKILL, resumed each time, and run to its end.
"""

from __future__ import annotations

import atexit
import builtins
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, forks
from torch.optim.optimizer import register_optimizer_step_post_hook

import observability as obs

SCRIPTS = {path.stem: path.read_text() for path in (ROOT / "tests/call_sites").glob("*.py")}
PIECES = SCRIPTS.pop("pieces")
TERM, KILL = int(signal.SIGTERM), int(signal.SIGKILL)
# The step that is under way at each of two kills. A checkpoint is made every 3 steps of 15.
CHAINS = {"term": [(7, TERM), (11, KILL)], "kill": [(8, KILL), (10, TERM)]}
SETTINGS = {"SAVE_INTERVAL": "3", "OBS_RESUME": "auto", "OBS_TENSORBOARD": "0"}
SETTINGS |= {"OBS_SYSTEM_INTERVAL": "0", "OBS_PLOT_INTERVAL": "0"}


# --- Running a script -----------------------------------------------------------------------------


def digest(*things: Any) -> None:
    """`final(…)` of the scripts: the bits of modules, of the tensors in a dict, and of values."""
    sums = hashlib.sha256()
    for thing in things:
        tree = thing.state_dict() if isinstance(thing, torch.nn.Module) else thing
        for value in tree.values() if isinstance(tree, dict) else [tree]:
            is_tensor = isinstance(value, torch.Tensor)
            sums.update(value.detach().numpy().tobytes() if is_tensor else repr(value).encode())
    Path("final").write_text(sums.hexdigest())


def run_here(folder: Path, kill: tuple[int, int] | None) -> None:
    """In a fork: what `python train.py` does, but for the import of torch."""
    os.chdir(folder)
    os.environ.update(SETTINGS)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.path.insert(0, "")
    sys.argv, builtins.final = ["train.py"], digest
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as a loader's workers start

    def end(*_: object) -> None:
        run = obs.current_run()
        run.settle()  # a step here is shorter than a write, and no save is to be skipped
        if kill is not None and run.steps == kill[0] - 1:
            os.kill(os.getpid(), kill[1])

    register_optimizer_step_post_hook(end)
    code = 0
    try:
        runpy.run_path("train.py", run_name="__main__")
    except BaseException as error:
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    if code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


class Chain:
    """One script's runs, each going on where the one before was killed."""

    def __init__(self, folder: Path, script: str, kills: Sequence[tuple[int, int]]) -> None:
        self.folder, self.kills = folder, [*kills, None]
        self.said: list[str] = []  # by each process
        self.inexact: list[list[str]] = []  # in the newest state.json after each
        folder.mkdir()
        (folder / "train.py").write_text(script)
        (folder / "pieces.py").write_text(PIECES)

    def start(self) -> Any:
        process = forks().Process(target=run_here, args=(self.folder, self.kills[len(self.said)]))
        process.start()
        return process

    def ended(self, process: Any) -> None:
        process.join()
        kill = self.kills[len(self.said)]
        log = self.folder / "log"
        self.said.append(log.read_text())
        log.unlink()
        assert process.exitcode == (-kill[1] if kill else 0), self.said[-1]
        state = self.folder / "out/run/checkpoints/latest/state.json"
        self.inexact.append(json.loads(state.read_text())["inexact"] if state.exists() else [])

    def final(self) -> str:
        return (self.folder / "final").read_text()


def run(*chains: Chain, most: int = 3) -> None:
    """Each to its end, or so many processes of it; what is independent runs side by side."""
    for at in range(most):
        started = [(each, each.start()) for each in chains if at < len(each.kills)]
        for chain, process in started:
            chain.ended(process)


def chains_of(tmp_path: Path, script: str) -> list[Chain]:
    return [Chain(tmp_path / name, script, kills) for name, kills in CHAINS.items()]


# --- Editing one ----------------------------------------------------------------------------------

MODEL = "model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))\n"
OPT = "opt = torch.optim.AdamW(model.parameters(), lr=0.05)\n"
LOADER = "loader = DataLoader(data, batch_size=4, shuffle=True)\n"
WATCH = "obs.watch(model, optimizer=opt"
LOOP = "for epoch in range(1, 4):\n"
EPOCH = "    if obs.skip_epoch(epoch): continue\n"
BATCHES = "for x, y in loader:"
BATCH = "        if obs.skip_batch(): continue\n"
LOSS = "        loss = (model(x) - y).square().mean()\n"
BACKWARD = "        loss.backward()\n"
UPDATE = "        opt.step()\n"
STEP = "        step += 1\n        obs.step(step, loss=loss, batch=x)\n"
FINISH = "obs.finish()\n"
FINAL = "final(model)"


def edited(*changes: tuple[str, str], of: str = "plain") -> str:
    """The script with each text replaced, which it has once."""
    text = SCRIPTS.get(of, of)
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def after(line: str, *lines: str) -> tuple[str, str]:
    """The lines behind that one, indented as it is, unless it opens a block."""
    indent = line[: len(line) - len(line.lstrip())]
    return line, line + "".join(f"{indent}{new}\n" for new in lines)


def before(line: str, *lines: str) -> tuple[str, str]:
    indent = line[: len(line) - len(line.lstrip())]
    return line, "".join(f"{indent}{new}\n" for new in lines) + line


def behind_the_epoch(*lines: str) -> tuple[str, str]:
    return FINISH, "".join(f"    {line}\n" for line in lines) + FINISH


def watching(**more: str) -> tuple[str, str]:
    return WATCH, WATCH + "".join(f", {kind}={name}" for kind, name in more.items())


def piece(name: str, made: str, instead_of: str = LOADER) -> tuple[str, str]:
    return instead_of, f"from pieces import {name}\n{made}\n"


def net(name: str) -> tuple[str, str]:
    return piece(name, f"model = {name}()", instead_of=MODEL)


def loader(arguments: str, *lines: str) -> tuple[str, str]:
    return LOADER, "".join(f"{line}\n" for line in lines) + f"loader = DataLoader({arguments})\n"


def scheduled(made: str, *, each: str, watched: bool) -> str:
    """With a scheduler, stepped by each step or epoch, that is watched or is in sight of resume."""
    per_epoch = f"sched.step({'loss.item()' if 'Plateau' in made else ''})"
    steps = behind_the_epoch(per_epoch) if each == "epoch" else before(STEP, "sched.step()")
    lines = [*made.split("\n")[:-1], f"sched = lr_scheduler.{made.split(chr(10))[-1]}"]
    return edited(after(OPT, *lines), steps, *([watching(scheduler="sched")] * watched))


SCHEDULERS = {
    "StepLR": ("StepLR(opt, 1, 0.5)", "epoch"),
    "cosine per step": ("CosineAnnealingLR(opt, 15)", "step"),
    "cosine per epoch": ("CosineAnnealingLR(opt, 3)", "epoch"),
    "warm restarts": ("CosineAnnealingWarmRestarts(opt, 4)", "step"),
    "plateau": ("ReduceLROnPlateau(opt, factor=0.5, patience=0)", "epoch"),
    "sequential": (
        "warm = lr_scheduler.LinearLR(opt, 0.1, total_iters=4)\n"
        "cosine = lr_scheduler.CosineAnnealingLR(opt, 11)\n"
        "SequentialLR(opt, [warm, cosine], [4])",
        "step",
    ),
}
SCALED = [
    (BACKWARD, "        scaler.scale(loss).backward()\n"),
    (UPDATE, "        scaler.unscale_(opt)\n        scaler.step(opt)\n        scaler.update()\n"),
]
GENERATORS = {
    "numpy": "np.random.default_rng(3)",
    "legacy numpy": "np.random.RandomState(3)",
    "Python": "random.Random(3)",
}
OWN = "g, r, n = torch.Generator(), random.Random(2), np.random.default_rng(5)"
DRAWS = before(LOSS, "x = x + torch.randn(4, generator=g) * r.random() + float(n.random())")
WRAPPED = [
    piece("SAM", "opt = SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)", OPT),
    (
        UPDATE,
        "        opt.ascend()\n        opt.zero_grad()\n"
        "        (model(x) - y).square().mean().backward()\n        opt.descend()\n",
    ),
]
AVERAGED = "ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))"
ACCUMULATES = [
    loader("data, batch_size=2, shuffle=True"),
    (BATCHES, "for i, (x, y) in enumerate(loader):"),
    ("        opt.zero_grad()\n", ""),
]


# --- Scripts that resume exactly ------------------------------------------------------------------

NOT_WHOLE = {"late", "taken", "readme_once"}
EXACT = {name: text for name, text in SCRIPTS.items() if name not in NOT_WHOLE}
EXACT |= {
    f"{name}{' in sight' * (not watched)}": scheduled(made, each=each, watched=watched)
    for name, (made, each) in SCHEDULERS.items()
    for watched in (True, False)
}
EXACT |= {
    f"a sampler with a {kind} generator{' in sight' * (not watched)}": edited(
        piece("Shuffled", f"rng = {made}\nloader = DataLoader(data, 4, sampler=Shuffled(rng))"),
        *([watching(generator="rng")] * watched),
    )
    for kind, made in GENERATORS.items()
    for watched in (True, False)
}
EXACT |= {
    "two workers": edited(loader("data, 4, shuffle=True, num_workers=2")),
    "augmentation here": edited(
        piece("Noisy", "loader = DataLoader(Noisy(data), 4, shuffle=True)")
    ),
    "augmentation in workers": edited(
        piece("Noisy", "loader = DataLoader(Noisy(data), 4, shuffle=True, num_workers=2)")
    ),
    "workers that live on for one epoch": edited(
        loader("data, 1, shuffle=True, num_workers=1, persistent_workers=True"),
        (LOOP, "for epoch in range(1):\n"),
        (BATCHES, "for x, y in itertools.islice(loader, 15):"),
    ),
    "an iterable dataset": edited(piece("Stream", "loader = DataLoader(Stream(data), 4)")),
    "accumulation": edited(
        *ACCUMULATES,
        (BACKWARD, "        (loss / 2).backward()\n        if (i + 1) % 2: continue\n"),
        after(UPDATE, "opt.zero_grad()"),
    ),
    "accumulation within an if": edited(
        *ACCUMULATES,
        (BACKWARD, "        (loss / 2).backward()\n        if (i + 1) % 2 == 0:\n"),
        (UPDATE, "            opt.step(), opt.zero_grad()\n"),
        (STEP, "            step += 1\n            obs.step(step, loss=loss)\n"),
    ),
    "LBFGS": edited(
        (OPT, "opt = torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=5)\n"),
        before(LOSS, "def closure():"),
        (LOSS.strip(), "    loss = (model(x) - y).square().mean()"),
        ("        opt.zero_grad()\n", "            opt.zero_grad()\n"),
        (BACKWARD, "            loss.backward()\n            return loss\n"),
        (UPDATE, "        loss = opt.step(closure)\n"),
    ),
    "a scaler": edited(
        after(OPT, "scaler = torch.amp.GradScaler('cpu', growth_interval=2)"),
        watching(scaler="scaler"),
        *SCALED,
    ),
    "a scaler in sight": edited(
        after(OPT, "scaler = torch.amp.GradScaler('cpu', growth_interval=2)"), *SCALED
    ),
    "a scaler that is off": edited(
        after(OPT, "scaler = torch.amp.GradScaler('cpu', enabled=False)"), *SCALED
    ),
    "a schedule by hand": edited(
        before(LOSS, "for g in opt.param_groups: g['lr'] = 0.05 * 0.9 ** step")
    ),
    "groups that the script holds": edited(
        after(OPT, "groups = opt.param_groups"),
        before(LOSS, "for g in groups: g['lr'] = 0.05 * 0.9 ** step"),
    ),
    "a wrapped optimizer": edited(*WRAPPED),
    "a wrapped optimizer and a schedule": edited(
        *WRAPPED,
        before('obs.init("run")\n', "sched = lr_scheduler.StepLR(opt, 2, 0.7)"),
        before(STEP, "sched.step()"),
    ),
    "an optimizer in sight, made after watch": edited(
        (OPT, OPT.replace("model.", "model[0].")),
        before("step = 0\n", "other = torch.optim.SGD(model[2].parameters(), 0.1, 0.9)"),
        after(UPDATE, "other.step(), other.zero_grad()"),
    ),
    "groups of parameters, tied weights, clipping": edited(
        (MODEL, MODEL.replace("nn.Tanh()", "nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8)")),
        before(OPT, "model[3].weight = model[2].weight"),
        (
            OPT,
            "rest = [*model[2].parameters(), model[3].bias, *model[4].parameters()]\n"
            "groups = [{'params': model[0].parameters(), 'lr': 0.01}, {'params': rest}]\n"
            "opt = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)\n",
        ),
        before(UPDATE, "nn.utils.clip_grad_norm_(model.parameters(), 0.5)"),
    ),
    "normalisation and dropout": edited(
        ("nn.Tanh()", "nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh()")
    ),
    "a model with constant buffers and a sum that begins anew": edited(net("Net")),
    "a counter in the model": edited(net("Counts")),
    "epochs that are left after a step, and whose loss is read": edited(
        (LOOP, "for epoch in range(1, 6):\n"),
        before(BATCH, "if obs.ended(): break"),
        ("batch=x)\n", "batch=x, last=step % 3 == 0)\n        if step % 3 == 0: break\n"),
        behind_the_epoch("print(loss.item())"),
    ),
    "sums that an epoch begins anew, and others that it does not": edited(
        ("step = 0\n", "step, sums, most = 0, [], 0.0\n"),
        ("step = obs.resume(step=step)", "step, sums = obs.resume(step=step, sums=sums)"),
        (LOOP, "for epoch in range(1, 6):\n"),
        after(
            EPOCH, "most = obs.resume(most=most)", "total = 0.0", "total = obs.resume(total=total)"
        ),
        (BATCHES, "for x, y in itertools.islice(loader, 3):"),
        after(UPDATE, "total += loss.item()"),
        behind_the_epoch(
            "most = max(most, total)", "sums = [*sums, total, most]", "print(loss.item())"
        ),
        (FINAL, "final(model, str(sums))"),
    ),
    "sums that a function begins anew": edited(
        ("step = 0\n", "step, sums = 0, []\n"),
        ("step = obs.resume(step=step)", "step, sums = obs.resume(step=step, sums=sums)"),
        (
            LOOP + EPOCH + "    " + BATCHES + "\n" + BATCH,
            "def train():\n"
            "    global step\n"
            "    total = obs.resume(total=0.0)\n"
            "    for x, y in itertools.islice(loader, 3):\n" + BATCH,
        ),
        after(UPDATE, "total += loss.item()"),
        (
            FINISH,
            "    print(loss.item())\n"
            "    return total\n"
            "for epoch in range(1, 6):\n" + EPOCH + "    sums = [*sums, train()]\n" + FINISH,
        ),
        (FINAL, "final(model, str(sums))"),
    ),
    "layers that are frozen by an epoch": edited(
        after(EPOCH, "if epoch == 1: model[0].requires_grad_(False)")
    ),
    "layers that are thawed by a step": edited(
        after(MODEL, "model[2].requires_grad_(False)"),
        before(LOSS, "if step == 4: model[2].requires_grad_(True)"),
    ),
    "dropout that an epoch changes": edited(
        ("nn.Tanh()", "nn.Dropout(0.1)"), after(EPOCH, "if epoch == 1: model[1].p = 0.7")
    ),
    "statistics that an epoch holds fast, against the way back": edited(
        ("nn.Tanh()", "nn.BatchNorm1d(8)"),
        after(EPOCH, "model.train()"),
        before(LOSS, "if step == 6: model[1].eval()"),
    ),
    "a number that the script gives the model": edited(
        net("Net"), before(LOSS, "model.scale = 1 / (1 + step)")
    ),
    "a frozen teacher": edited(
        after(MODEL, "teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()"),
        before(LOSS, "with torch.no_grad(): y = y + teacher(x).mean()"),
    ),
    "an average that is watched": edited(
        piece("Average", f"{MODEL}ema = Average(model)", MODEL),
        (WATCH, WATCH.replace("model", "model, ema.shadow")),
        before(STEP, "ema.update(model)"),
        (FINAL, "final(model, ema.shadow)"),
    ),
    "an AveragedModel that is watched": edited(
        after(MODEL, AVERAGED),
        (WATCH, WATCH.replace("model", "model, ema")),
        before(STEP, "ema.update_parameters(model)"),
        (FINAL, "final(model, ema)"),
    ),
    "validation with its own loader": edited(
        after(LOADER, "val = DataLoader(data, batch_size=10, shuffle=True)"),
        behind_the_epoch(
            "with torch.no_grad(): losses = [(model(x) - y).square().mean() for x, y in val]",
            "obs.validation(sum(losses) / len(losses))",
        ),
    ),
    "validation with a generator seeded for each": edited(
        after(LOADER, "g_val = torch.Generator()"),
        behind_the_epoch(
            "g_val.manual_seed(7)",
            "x, y = data[torch.randperm(20, generator=g_val)[:5]]",
            "obs.validation((model(x) - y).square().mean())",
        ),
    ),
    "the last loss read behind the loop": edited(behind_the_epoch("print(loss.item(), x.shape)")),
    "the best weights kept aside": edited(
        ("step = 0\n", "step, best, kept = 0, math.inf, {}\n"),
        (
            "step = obs.resume(step=step)",
            "step, best, kept = obs.resume(step=step, best=best, kept=kept)",
        ),
        behind_the_epoch(
            "if loss.item() < best: best, kept = loss.item(), copy.deepcopy(model.state_dict())"
        ),
        (FINAL, "final(model, kept)"),
    ),
    "what step() was given, and changes behind the loop": edited(
        ("step = 0\n", "step, total = 0, 0.0\n"),
        ("step = obs.resume(step=step)", "step, total = obs.resume(step=step, total=total)"),
        ("batch=x)", 'batch=x, carry={"step": step, "total": total})'),
        behind_the_epoch("total += loss.item()"),
        (FINAL, "final(model, total)"),
    ),
    "plain values of all kinds": edited(
        ("step = 0\n", "step, kept = 0, {'a': (1, [2.5, None]), 'b': np.float64(3), 'c': b'd'}\n"),
        ("step = obs.resume(step=step)", "step, kept = obs.resume(step=step, kept=kept)"),
        after(UPDATE, "kept = {**kept, 'a': (step, [loss.item(), x]), 'b': np.float64(step)}"),
        (FINAL, "final(model, str(kept))"),
    ),
    "a generator of the loader, for one epoch": edited(
        loader(
            "data, 4, sampler=RandomSampler(data, True, 60, g)",
            "g = torch.Generator().manual_seed(3)",
        ),
        (LOOP, "for epoch in range(1):\n"),
    ),
    "a generator of the loader, watched": edited(
        loader("data, 4, shuffle=True, generator=g", "g = torch.Generator().manual_seed(3)"),
        watching(generator="g"),
    ),
    "a generator of the loader, in sight": edited(
        loader("data, 4, shuffle=True, generator=torch.Generator().manual_seed(3)")
    ),
    "a generator of the loader, seeded for each epoch": edited(
        loader("data, 4, shuffle=True, generator=g", "g = torch.Generator()"),
        after(EPOCH, "g.manual_seed(100 + epoch)"),
    ),
    "a generator made for each epoch": edited(
        after(EPOCH, "order = np.random.RandomState(epoch).permutation(20)"),
        (BATCHES, "for x, y in (data[order[at : at + 4]] for at in range(0, 20, 4)):"),
    ),
    "generators of the script, watched": edited(
        after(LOADER, OWN), watching(generator="[g, r, n]"), DRAWS
    ),
    "generators of the script, in sight": edited(after(LOADER, OWN), DRAWS),
    "set_epoch": edited(
        loader(
            "data, 4, sampler=sampler",
            "sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=4)",
        ),
        after(EPOCH, "sampler.set_epoch(epoch)"),
    ),
    "a weighted sampler": edited(
        loader("data, 4, sampler=WeightedRandomSampler(torch.ones(20), 20)")
    ),
    "a loader with a state": edited(
        piece("Stateful", "loader = Stateful(data)"), watching(loader="loader")
    ),
    "odd objects in sight": edited(
        piece("Odd", f"{LOADER}odd = [Odd(True), Odd(False), random.SystemRandom()]")
    ),
    "meters": edited(
        piece("Meter", f"{LOADER}meter, timer = Meter(), Meter()"),
        after(LOSS, "meter(loss.item()), timer.step()"),
    ),
    "a progress bar": edited(
        (BATCHES, "bar = tqdm(loader, file=open('bar', 'w'))\n    for x, y in bar:"),
        after(LOSS, "bar.set_postfix(loss=loss.item())"),
    ),
    "two loaders side by side": edited(
        after(LOADER, "other = DataLoader(data, batch_size=4, shuffle=True)"),
        (BATCHES, "for (x, y), (z, _) in zip(loader, other):"),
        before(LOSS, "x = x + z"),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_it_resumes_to_the_same_bits_and_nothing_is_said(tmp_path, name):
    straight, chains = Chain(tmp_path / "whole", EXACT[name], []), chains_of(tmp_path, EXACT[name])
    run(straight, *chains)
    for chain in chains:
        said = "".join(chain.said)
        assert not re.search("exact|failed|not saved", said), said
        assert chain.inexact == [[]] * 3
        assert said.count("resume at step") == 2, said
        assert chain.final() == straight.final()


# --- Scripts that do not: what is said ------------------------------------------------------------

INEXACT = {
    "an optimizer out of sight": (
        edited(
            (OPT, OPT.replace("model.", "model[0].")),
            piece("hidden", LOADER + "steps = hidden(torch.optim.Adam(model[2].parameters()))"),
            after(UPDATE, "steps()"),
        ),
        r"an unwatched Adam steps; add it to watch\(optimizer",
    ),
    "a scheduler out of sight": (
        edited(
            piece("hidden", LOADER + "steps = hidden(lr_scheduler.StepLR(opt, 4, 0.5))"),
            after(UPDATE, "steps()"),
        ),
        r"a scheduler drives the optimizer and is not watched; add watch\(scheduler=…\)",
    ),
    "an optimizer made after resume": (SCRIPTS["late"], r"an unwatched AdamW steps; add it to"),
    "a scaler made after resume": (
        SCRIPTS["late"],
        r"`scaler` is not watched; add watch\(scaler=scaler\) before resume\(\)",
    ),
    "a generator made after resume": (
        SCRIPTS["late"],
        r"`g` moves and is in no checkpoint; add watch\(generator=g\)",
    ),
    "a generator made for each epoch, and used in it": (
        edited(
            after(EPOCH, "rng = np.random.RandomState(epoch)"),
            before(LOSS, "x = x + float(rng.rand())"),
        ),
        r"`rng` moves and is in no checkpoint",
    ),
    "an average by its data": (
        edited(
            piece("Average", f"{MODEL}ema = Average(model)", MODEL),
            before(STEP, "ema.update(model)"),
        ),
        r"`ema.shadow` moves and is in no checkpoint; add obs.watch\(ema.shadow\)",
    ),
    "an average in a dict": (
        edited(
            piece("Shadows", f"{MODEL}ema = Shadows(model)", MODEL),
            before(STEP, "ema.update(model)"),
        ),
        r"`ema.shadow` moves and is in no checkpoint; keep it in a Module",
    ),
    "an average by load_state_dict": (
        edited(
            after(MODEL, "slow = copy.deepcopy(model)"),
            before(
                STEP,
                "pairs = zip(slow.state_dict().items(), model.state_dict().values())",
                "slow.load_state_dict({n: 0.9 * mine + 0.1 * its for (n, mine), its in pairs})",
            ),
        ),
        r"`slow` moves and is in no checkpoint; add obs.watch\(slow\)",
    ),
    "an AveragedModel": (
        edited(after(MODEL, AVERAGED), before(STEP, "ema.update_parameters(model)")),
        r"`ema` moves and is in no checkpoint; add obs.watch\(ema\)",
    ),
    "a critic that nobody watches": (
        edited(
            ("obs.watch(netG, netD, optimizer=[optG, optD])", "obs.watch(netG, optimizer=optG)"),
            of="gan",
        ),
        r"`netD` moves and is in no checkpoint; add obs.watch\(netD\)",
    ),
    "parameters in no watched model": (
        edited(
            after(MODEL, "w = torch.zeros(1, requires_grad=True)"),
            (OPT, OPT.replace("model.parameters()", "[*model.parameters(), w]")),
            (LOSS, LOSS.replace("model(x)", "model(x) + w")),
        ),
        "1 parameters of the optimizer are in no watched model; watch that too",
    ),
    "workers that live on": (
        edited(loader("data, 4, shuffle=True, num_workers=1, persistent_workers=True")),
        "the workers of `loader` live on; give it persistent_workers=False",
    ),
    "workers that live on and draw": (
        edited(
            piece(
                "Noisy",
                "loader = DataLoader(Noisy(data), 4, num_workers=1, persistent_workers=True)",
            )
        ),
        "the workers of `loader` live on; give it persistent_workers=False",
    ),
    "a schedule of the script's own": (
        edited(piece("Noam", f"{LOADER}noam = Noam(opt)"), (UPDATE, "        noam.step()\n")),
        "`noam.made` moves and is in no checkpoint; carry it",
    ),
    "a generator that an epoch makes and its batches draw from": (
        edited(
            after(EPOCH, "g = torch.Generator().manual_seed(epoch)"),
            before(LOSS, "x = x + torch.randn(4, generator=g)"),
        ),
        r"`g` is made within the epoch; make it before resume\(\) and seed it",
    ),
    "an early stop that knows no best at first": (
        edited(
            piece("EarlyStopping", f"{LOADER}stopping = EarlyStopping()\nstopping.best = None"),
            behind_the_epoch(
                "if stopping.best is None or loss.item() < stopping.best:",
                "    stopping.best = loss.item()",
                "if stopping.stops: break",
            ),
        ),
        "`stopping.best` moves and is in no checkpoint; carry it",
    ),
    "a count of evaluations in an object": (
        edited(
            piece("EarlyStopping", f"{LOADER}stopping = EarlyStopping()"),
            behind_the_epoch("stopping(loss.item())", "if stopping.stops: break"),
        ),
        "`stopping.(best|counter)` moves and is in no checkpoint; carry it",
    ),
    "a buffer that is not persistent and moves": (
        edited(net("Remembers")),
        "`Remembers.seen` moves and is in no checkpoint; make it a persistent buffer",
    ),
    "a sampler that counts its epochs": (
        edited(piece("Counting", "loader = DataLoader(data, 4, sampler=Counting())")),
        "`loader.sampler.epoch` moves and is in no checkpoint; carry it",
    ),
    "a loader that keeps its place": (
        edited(
            piece("Windows", "loader = Windows(data)"),
            (BATCHES, "for _ in range(5):"),
            before(LOSS, "x, y = loader.next_batch()"),
        ),
        "`loader.position` moves and is in no checkpoint; carry it",
    ),
    "a loader with a state that nobody watches": (
        edited(piece("Stateful", "loader = Stateful(data)")),
        "`loader.at` moves and is in no checkpoint; add watch",
    ),
    "an iterator made before resume": (
        edited(
            before("step = 0\n", "it = iter(loader)"),
            loader("data, 1, shuffle=True"),
            (LOOP, "for epoch in range(1):\n"),
            (BATCHES, "for x, y in it:"),
        ),
        r"`it` was made before resume\(\); call resume\(\) before iter\(\)",
    ),
    "next() with a wrap-around": (
        SCRIPTS["taken"],
        "the place of `batches` is not kept; loop over its loader",
    ),
    "next() of a cycle": (
        edited(("\nbatches = iter(loader)\n", "\nbatches = cycle(loader)\n"), of="taken"),
        "the place of `batches` is not kept; loop over its loader",
    ),
    "no skip lines": (
        edited((EPOCH, ""), (BATCH, "")),
        r"`if obs.skip_epoch\(…\): continue`.*`if obs.skip_batch\(\): continue`",
    ),
    "no skip_batch": (edited((BATCH, "")), r"`if obs.skip_batch\(\): continue`"),
    "no skip_batch, as the README once had it": (
        SCRIPTS["readme_once"],
        r"`if obs.skip_batch\(\): continue`",
    ),
    "no skip_epoch": (edited((EPOCH, "")), r"`if obs.skip_epoch\(…\): continue`"),
    "no resume()": (
        edited(("step = obs.resume(step=step)\n", ""), (EPOCH, ""), (BATCH, "")),
        r"resume\(\) is never called; add obs.resume\(\) before the loop",
    ),
    "nothing watched": (edited((f"{WATCH})\n", "")), "no model is watched; add obs.watch"),
    "a count that is not carried": (
        edited(
            ("step = obs.resume(step=step)", "obs.resume()"),
            before(LOSS, "for g in opt.param_groups: g['lr'] = 0.05 * 0.9 ** step"),
        ),
        r"the loops go on from step; add step = obs.resume\(step=step\)",
    ),
    "a best value that is not carried": (
        edited(
            ("step = 0\n", "step, best = 0, math.inf\n"),
            behind_the_epoch("if loss.item() < best: best = loss.item()"),
        ),
        r"the loops go on from best; add best = obs.resume\(best=best\)",
    ),
    "an order that is shuffled where it lies": (
        edited(
            (LOADER, "order = list(range(20))\n"),
            after(EPOCH, "random.shuffle(order)"),
            (BATCHES, "for x, y in (data[order[at : at + 4]] for at in range(0, 20, 4)):"),
        ),
        r"the loops go on from order; add order = obs.resume\(order=order\)",
    ),
    "a scheduler at the top of an epoch": (
        edited(
            after(OPT, "sched = lr_scheduler.ExponentialLR(opt, 0.5)"), after(EPOCH, "sched.step()")
        ),
        r"`sched.step\(\)` is done again on the way back; put it behind the loop within",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_a_resume_would_miss_is_said_with_the_line_to_add(tmp_path, name):
    script, words = INEXACT[name]
    chains = chains_of(tmp_path, script)
    run(*chains, most=2)
    for chain in chains:
        first, second = chain.said
        assert re.search(f"a resume will not be exact: .*{words}", first, re.DOTALL), first
        assert re.search(words, "\n".join(chain.inexact[0]), re.DOTALL)
        if "never calls resume(): it begins anew" not in second:
            assert re.search(f"was saved with this said: .*{words}", second, re.DOTALL), second


def test_what_resume_asks_for_and_no_save_can_see_is_said_and_then_refused(tmp_path):
    script = edited((', carry={"global_step": self.global_step}', ""), of="trainer")
    script = edited(
        ("class Trainer:", "global_step = 99  # another one\nclass Trainer:"), of=script
    )
    chain = Chain(tmp_path / "run", script, [CHAINS["term"][0]])
    run(chain, most=1)
    words = "global_step, which resume() asks for, cannot be seen from step(); give it carry="
    assert words in chain.said[0]
    assert [words in sentence for sentence in chain.inexact[0]] == [True]
    with pytest.raises(AssertionError, match=r"CheckpointError: .* has no global_step"):
        chain.ended(chain.start())


@pytest.mark.parametrize(
    "value", ["pathlib.Path('a')", "collections.deque([1])", "collections.Counter('a')", "Own()"]
)
def test_a_local_that_cannot_be_carried_is_not_called_saved(tmp_path, value):
    script = edited(
        ("import copy\n", "import copy, pathlib\nclass Own(list): pass\n"),
        ("step = 0\n", f"step, odd = 0, {value}\n"),
        ("step = obs.resume(step=step)", "step, odd = obs.resume(step=step, odd=odd)"),
    )
    straight, chains = Chain(tmp_path / "whole", script, []), chains_of(tmp_path, script)
    run(straight, *chains)
    for chain in chains:
        assert "step 3 was not saved: odd is a" in chain.said[0]
        assert "start at step 0" in chain.said[1]
        assert chain.final() == straight.final()
