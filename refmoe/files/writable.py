# SPDX-License-Identifier: Apache-2.0
"""No output replaces an input, and an output that cannot be written is found before the work, not after it.

All outputs go through `refmoe.files.atomic.replacing`, which asks `refuse_to_replace`. A command tells its inputs with
`protecting`, and has its outputs checked with `refuse_outputs` before it computes anything.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from refmoe.errors import InputError

NEVER_READ = (".html", ".xml", ".svg", ".png")
"""Endings of files that refmoe only writes. They may be written anew into the folder of an input."""

_protected: ContextVar[tuple[Path, ...]] = ContextVar("protected", default=())


_of_owners: list[tuple[weakref.ref[Any], tuple[Path, ...]]] = []
"""Objects that read from files for as long as they live, and their files."""


def protect_while_alive(owner: Any, files: Iterable[Path]) -> None:
    """Let no output replace these files while an object that reads from them lives."""
    _of_owners[:] = [(each, paths) for each, paths in _of_owners if each() is not None]
    _of_owners.append((weakref.ref(owner), tuple(files)))


@contextmanager
def protecting(inputs: Iterable[Path]) -> Iterator[None]:
    """Let no output replace one of these files, or a file in one of these folders, while the body runs."""
    token = _protected.set((*_protected.get(), *inputs))
    try:
        yield
    finally:
        _protected.reset(token)


def make_folder(folder: Path, parents: bool = False, exist_ok: bool = True) -> None:
    """Make a folder, as `Path.mkdir` does. Raises InputError when it cannot be made."""
    try:
        folder.mkdir(parents=parents, exist_ok=exist_ok)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from None


def refuse_outputs(files: Sequence[Path], folders: Sequence[Path] = ()) -> None:
    """Raises InputError when outputs cannot be written, or would replace a protected input or each other.

    files, folders: the outputs that are files, and those that are folders to fill
    """
    for i, path in enumerate(files):
        refuse_output(path)
        if any(_same(path, other) for other in files[:i]):
            raise InputError(f"{path}: two outputs have this name, but two files were expected")
    for path in folders:
        _refuse_folder(path)


def refuse_output(path: Path) -> None:
    """Raises InputError when a file cannot be written to this path, or is a protected input."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: is a folder, but the name of a file to write was expected")
    if found is not None and not stat.S_ISREG(found.st_mode):
        # the rename would put a file in the place of the device or pipe
        raise InputError(f"{path}: is no ordinary file, but the name of a file to write was expected")
    refuse_to_replace(path)
    if (path.parent / "case.toml").exists():
        raise InputError(f"{path}: lies in the folder of a golden case, but another folder was expected")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as trial:
            trial.write(b"\0")  # a full disk lets a file be made, and nothing be written to it
            trial.flush()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def need_space(path: Path, size: int) -> None:
    """Raises InputError when the disk of an output has less free than its size, in bytes."""
    there = next((each for each in path.absolute().parents if each.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    if size > free:
        raise InputError(f"{path}: takes {size:,} bytes, but {free:,} bytes are free on its disk")


def refuse_to_replace(path: Path) -> None:
    """Raises InputError when a file is, or lies in, a protected input. Links and letter case make no difference."""
    for source in _protected.get():
        if source.is_dir():
            inside = _inside(path, source)
            if inside and path.exists() and path.suffix.lower() not in NEVER_READ:
                raise InputError(f"{path}: is a file of the input {source}, but another file to write was expected")
        elif path.exists() and _same(path, source):
            raise InputError(f"{path}: is an input of this command, but another file to write was expected")
    for owner, files in _of_owners:
        if owner() is not None and path.exists() and any(_same(path, each) for each in files):
            raise InputError(f"{path}: a loaded model reads from this file, but another file to write was expected")


def _refuse_folder(path: Path) -> None:
    """Raises InputError when a folder cannot be filled, or is or lies in a protected input."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, but the name of a folder to fill was expected")
    for source in _protected.get():
        if source.is_dir() and (_same(path, source) or _inside(path, source)):
            raise InputError(f"{path}: is or lies in the input {source}, but another folder to fill was expected")
    there = next((each for each in (path, *path.absolute().parents) if each.exists()), path)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder, by its names, by a symbolic link or by a hard link to one of its files."""
    real = Path(os.path.realpath(path))
    if any(_same(parent, folder) for parent in real.parents):
        return True
    try:
        linked = path.stat().st_nlink > 1 and path.is_file()
    except OSError:
        return False
    return linked and any(_same(path, each) for each in folder.rglob("*") if each.is_file())


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same place, which need not be there."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)
