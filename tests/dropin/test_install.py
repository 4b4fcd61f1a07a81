"""`pip install .` gives the two modules and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MAINRUN, ROOT, python


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip installs, in a folder of its own; built from a copy, as a build leaves traces."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(MAINRUN, source / "mainrun", ignore=shutil.ignore_patterns("out", "logs"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    done = python("-m", "pip", "install", *options, source)
    assert done.returncode == 0, done.stderr
    return target


def test_an_installation_has_the_two_modules_and_none_of_the_recipe(installed):
    modules = sorted(path.name for path in installed.glob("*.py"))
    assert modules == ["observability.py", "observability_tools.py"]
    for name in modules:
        assert (installed / name).read_bytes() == (MAINRUN / name).read_bytes()


def test_it_needs_no_other_package(installed):
    [metadata] = installed.glob("mainrun_observability-*.dist-info/METADATA")
    fields = metadata.read_text(encoding="utf-8").partition("\n\n")[0]
    assert "Requires-Python: >=3.10" in fields
    assert "Requires-Dist" not in fields


def test_the_command_is_the_one_of_the_file(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, installed / "bin" / "observability", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    by_file = python(MAINRUN / "observability.py", "--help")
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        line.split() for line in by_file.stdout.splitlines()[1:]
    ]
