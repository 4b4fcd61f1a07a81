"""A stranger's script in a folder of its own, run as by `python train.py`.

It runs in a fork of a process that has torch already, and so begins at once. Settings come by the
environment, as in a shell; what it prints and what is said come back together.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import forks


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

    def start(self, before: Callable[[], Any] = bool, **environment: object) -> Running:
        """`before` is called in the new process; it has to be a function of a module."""
        log = self.folder / f".said{len([*self.folder.glob('.said*')])}"
        log.touch()
        variables = {"OBS_SYSTEM_INTERVAL": "0", "OBS_DRAIN_INTERVAL": "0.05"}
        variables |= {name: str(value) for name, value in environment.items()}
        arguments = (self.folder, self.name, log, variables, before)
        process = forks().Process(target=run_script, args=arguments)
        process.start()
        return Running(process, log)

    def run(self, code: int | None = 0, **environment: Any) -> Ended:
        return self.start(**environment).wait(code)

    def killed(self, **environment: Any) -> Ended:
        return self.run(-signal.SIGKILL, **environment)


def run_script(
    folder: Path, name: str, log: Path, variables: Mapping[str, str], before: Callable[[], Any]
) -> None:
    """What `python train.py` does, but for the start of the interpreter."""
    os.chdir(folder)
    os.environ.update(variables)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [name]
    sys.path.insert(0, str(folder))
    torch.set_num_threads(1)
    before()
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


def tree(folder: Path) -> dict[str, Any]:
    """Every byte below a folder, and where its links lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
