"""Disks that fill and lose their power, for real: mounts of this machine, where it allows them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(at: Path, *options: str) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine lets us mount nothing: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@contextmanager
def after_power_cut(
    tmp_path: Path, job: Callable[[Path, Callable[[], None]], None]
) -> Iterator[Path]:
    """An ext4 disk as it is found after its power went in the middle of `job(disk, cut)`.

    What the disk had been given when `cut` was called is the image file; what the kernel still
    held is not.
    """
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    image, left = tmp_path / "disk.img", tmp_path / "cut.img"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk:
        job(disk, lambda: shutil.copyfile(image, left) and None)
    with mounted(tmp_path / "again", "-o", "loop", str(left)) as disk:
        yield disk
