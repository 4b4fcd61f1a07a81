"""The files that the patcher writes: the script, its backup, and the drop-in beside it.

A script is written whole or not at all, through a link to the file behind it; the folder of that
file is where the backup and the drop-in go. What fails raises, and leaves the folder as it was.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lines import PatchError

__all__ = ["apply", "backup", "drop_backup", "in_package", "write"]


def in_package(path: Path, data: bytes) -> bool:
    """Whether others import it as a part of a package: it then finds what lies beside it by its
    package alone. Told from its own imports, and from those of the files beside and above it."""
    if re.search(rb"^[ \t]*from[ \t]+\.", data, re.M):
        return True
    if re.search(rb"^if[ \t(]+__name__\b", data, re.M):
        return False
    path = path.resolve()
    package, module = (re.escape(name) for name in (path.parent.name, path.stem))
    imports = re.compile(
        rf"(?:import|from)[ \t]+(?:\w+\.)*{package}\.{module}\b|from[ \t]+\.{module}[ \t]+import|"
        rf"from[ \t]+(?:(?:\w+\.)*{package}|\.)[ \t]+import\b[^#\n]*\b{module}\b".encode()
    )
    return any(imports.search(_read(file)) for file in _files_near(path))


def _files_near(path: Path) -> Iterator[Path]:
    """In its folder, in that of each package around, and where the outermost package lies."""
    folder, is_package = path.parent, True
    while is_package and folder != folder.parent:
        yield from (file for file in itertools.islice(folder.glob("*.py"), 500) if file != path)
        is_package = folder == path.parent or (folder / "__init__.py").exists()
        folder = folder.parent


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size < 1 << 20:
            return path.read_bytes()
    return b""


def apply(path: Path, data: bytes, result: bytes) -> str:
    """Write the patched script, keep the original beside it, and copy the drop-in to it."""
    if state := uncommitted(path):
        print(f"{path}: {state}; the backup has it", file=sys.stderr)
    drop_in = path.resolve().with_name("observability.py")
    made = [] if drop_in.exists() else [drop_in]
    try:
        said = place_drop_in(path)
        saved, fresh = backup(path, data)
        made += [saved] if fresh else []
        write(path, result)
    except (OSError, PatchError):  # made for nothing
        for place in made:
            place.unlink(missing_ok=True)
        raise
    return f"backup in {saved.name}; {said}"


def uncommitted(path: Path) -> str:
    """What git would lose if the file were overwritten; '' when committed, or outside of git."""
    path = path.resolve()
    try:
        done = subprocess.run(
            ["git", "status", "--porcelain", "--", path.name],
            timeout=10,
            cwd=path.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    if done.stdout.startswith("??"):
        return "not in git yet"
    return "has uncommitted changes" if done.stdout.strip() else ""


def place_drop_in(path: Path) -> str:
    source = Path(__file__).resolve().parent.parent / "mainrun" / "observability.py"
    goal = path.resolve().parent / "observability.py"
    if goal.exists():
        return f"{goal.name} is already beside it"
    if not source.exists():
        return f"copy observability.py beside it yourself: it is not at {source}"
    shutil.copyfile(source, goal)
    return f"copied {goal.name} beside it"


def write(path: Path, data: bytes) -> None:
    """Whole or not at all: beside the file, then over it; the mode is kept, a link is followed."""
    path = path.resolve()
    staging = path.with_name(f".autopatch-{os.getpid()}.tmp")
    try:
        # A rename would put another file in the place of one that must not be written.
        if not path.stat().st_mode & 0o222:
            raise PermissionError(errno.EACCES, "it is read-only")
        with staging.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, staging)
        os.replace(staging, path)
    except OSError as error:
        raise PatchError(f"cannot write {path}: {error.strerror}; it is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)


def backup(path: Path, data: bytes) -> tuple[Path, bool]:
    """`train.py.before-observability`, numbered if that name holds something else; is it new?"""
    path = path.resolve()
    for number in itertools.chain([""], map("-{}".format, itertools.count(2))):
        place = path.with_name(f"{path.name}.before-observability{number}")
        if not os.path.lexists(place):
            place.write_bytes(data)
            shutil.copymode(path, place)
            return place, True
        if place.is_file() and place.read_bytes() == data:
            break
    return place, False


def drop_backup(path: Path, data: bytes) -> None:
    """Delete the backups of exactly this content."""
    path = path.resolve()
    for place in path.parent.iterdir():
        is_one = place.name.startswith(f"{path.name}.before-observability") and place.is_file()
        if is_one and place.read_bytes() == data:
            place.unlink()
