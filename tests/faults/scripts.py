"""A stranger's script in a folder of its own, run as by `python train.py`.

It runs in a fork of a process that has torch already, and so begins at once. Settings come by the
environment, as in a shell; what it prints and what is said come back together.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import forks, python

TRAINING = """
import os, signal, time, torch
import observability as obs

steps, kill_at = int(os.environ["STEPS"]), int(os.environ.get("KILL_AT", "0"))
torch.manual_seed(1)
model = torch.nn.Linear(4, 1)
opt = torch.optim.AdamW(model.parameters(), lr=float(os.environ.get("LR", "0.05")))
run = obs.init(os.environ.get("NAME"), config={"steps": steps, "lr": opt.defaults["lr"]})
obs.watch(model, optimizer=opt)
step = 0
signal.alarm(int(os.environ.get("SECONDS", "0")))
step = obs.resume(step=step)
signal.alarm(0)
print("from", step)
while os.environ.get("HOLD") and not os.path.exists("go"):
    time.sleep(0.01)
while step < steps:
    loss = model(torch.rand(8, 4)).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    step += 1
    print("loss", step, loss.item().hex())
    obs.step(step, loss=loss)
    run.settle()
    if step == kill_at:
        os.kill(os.getpid(), 9)
obs.finish()
"""
SAVING = {"SAVE_INTERVAL": 1, "STEPS": 6}
AUTO = {**SAVING, "OBS_RESUME": "auto"}


class Ended(NamedTuple):
    code: int  # as a shell has it; of a signal its number, negative
    said: str

    def lines(self, word: str) -> list[str]:
        """What the script printed after that word, a line each."""
        printed = (line.partition(" ") for line in self.said.splitlines())
        return [rest for first, _, rest in printed if first == word]


class Running:
    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.log = process, log
        atexit.register(process.kill)  # or a test that fails would wait for it without an end

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, word: str, times: int = 1) -> Running:
        """Until the script has printed a word so often."""
        while self.process.is_alive() and self.said.count(word) < times:
            time.sleep(0.002)
        assert self.said.count(word) >= times, self.said
        return self

    def send(self, number: int) -> Running:
        os.kill(self.process.pid, number)
        return self

    def wait(self, code: int | None = 0) -> Ended:
        self.process.join(120)
        assert code is None or self.process.exitcode == code, self.said
        return Ended(self.process.exitcode, self.said)


class Script:
    """The script, and the folder that it lies in."""

    def __init__(self, folder: Path, source: str, name: str = "train.py") -> None:
        self.folder, self.name = folder, name
        self.out = folder / "out"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(source))

    def arguments(self, environment: Mapping[str, object]) -> tuple[Any, ...]:
        """Of `run_script`."""
        log = self.folder / f".said{len([*self.folder.glob('.said*')])}"
        log.touch()
        variables = {"OBS_SYSTEM_INTERVAL": "0", "OBS_DRAIN_INTERVAL": "0.05"}
        variables |= {name: str(value) for name, value in environment.items()}
        return str(self.folder), self.name, str(log), variables

    def start(self, **environment: object) -> Running:
        arguments = self.arguments(environment)
        process = forks().Process(target=run_script, args=arguments)
        process.start()
        return Running(process, Path(arguments[2]))

    def run(self, code: int | None = 0, **environment: Any) -> Ended:
        return self.start(**environment).wait(code)

    def killed(self, **environment: Any) -> Ended:
        return self.run(-signal.SIGKILL, **environment)


def run_script(folder: str, name: str, log: str, variables: Mapping[str, str]) -> None:
    """What `python train.py` does, but for the start of the interpreter."""
    os.chdir(folder)
    os.environ.update(variables)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [name]
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    code = 0
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(code)


def on_a_bad_disk(runs: Sequence[tuple[Script, Mapping[str, object]]]) -> list[Ended]:
    """One after the other, above disk.c, that takes its orders by the environment."""
    folder = Path(tempfile.mkdtemp())
    source, library = Path(__file__).with_name("disk.c"), folder / "disk.so"
    command = ["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    arguments = [script.arguments(environment) for script, environment in runs]
    place = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys, json; from faults.scripts import run_all; run_all(json.loads(sys.argv[1]))"
    done = python("-c", code, json.dumps(arguments), env={**os.environ, **place})
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return [Ended(code, Path(each[2]).read_text()) for code, each in zip(codes, arguments)]


def run_all(arguments: Sequence[Any]) -> None:
    import torch._dynamo  # noqa: F401, which each would import for itself

    codes = []
    for each in arguments:
        child = os.fork()
        if child == 0:
            run_script(*each)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))


def tree(folder: Path) -> dict[str, Any]:
    """Every byte below a folder, and where its links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def of_runs(out: Path) -> dict[str, Any]:
    """Without who holds a run, and what its ranks tell each other."""
    files = tree(out).items()
    return {path: bits for path, bits in files if not path.endswith(".lock") and path[0] != "."}


def origin(ended: Ended) -> str:
    """The step that a run began from."""
    [step] = ended.lines("from")
    return step


def refused(ended: Ended) -> str:
    """The error that ended it, which resume() raised."""
    assert ended.code == 1
    assert not ended.lines("from")
    assert "obs.resume(" in ended.said
    line = re.sub(r"^\[rank\d+\]: ", "", ended.said.splitlines()[-1])  # as torchrun marks it
    kind, _, said = line.partition(": ")
    assert kind in ("observability.CheckpointError", "observability.DamageError")
    return said
