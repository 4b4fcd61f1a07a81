"""Scripts in processes of their own, and waiting for what happens in its own time."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import MAINRUN, python


def script(folder: Path, body: str, *, init: str = "'run'") -> Path:
    """A script in `folder` with a run that is open."""
    path = folder / "train.py"
    head = f"import sys, observability as obs\nobs.init({init})\n"
    text = head + textwrap.dedent(body)
    if not path.exists() or path.read_text() != text:  # another process may be about to read it
        path.write_text(text)
    return path


def run_script(
    folder: Path, body: str, *arguments: str, init: str = "'run'", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; its outcome."""
    env = {**os.environ, "PYTHONPATH": str(MAINRUN), **environment}
    return python(script(folder, body, init=init), *arguments, env=env)


def start_script(
    folder: Path, body: str, *, init: str = "'run'", **environment: str
) -> subprocess.Popen[str]:
    """Start it; its input and output are pipes."""
    return subprocess.Popen(
        [sys.executable, str(script(folder, body, init=init))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(MAINRUN), **environment},
    )


def wait_until(happened: Callable[[], Any], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def wait_for_words(capfd: Any, words: str) -> str:
    """Until they are on stderr; all that was said by then."""
    said: list[str] = []
    wait_until(lambda: said.append(capfd.readouterr().err) or words in "".join(said))
    return "".join(said)
