# SPDX-License-Identifier: Apache-2.0
"""Replace files atomically: a reader finds the old file or the whole new one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.lock import lock
from refmoe.files.writable import refuse_to_replace

_passing: ContextVar[bool] = ContextVar("passing", default=False)


@contextmanager
def passing() -> Iterator[None]:
    """Files that the body writes need not outlast a loss of power, so that nobody waits for the disk."""
    token = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(token)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; when the body succeeds, sync it and rename it to `path`.

    Raises InputError when the folder cannot be written to, or the file is a protected input. If the body raises,
    `path` stays as it was.
    """
    refuse_to_replace(path)
    try:
        handle, temporary = _temporary(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes a private file; the final file gets ordinary permissions
        if _passing.get():
            temporary.replace(path)
            return
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new temporary file for `path`, open and locked. Those that killed processes have left are removed."""
    _remove_abandoned(path)
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        lock(handle)
        if os.fstat(handle).st_nlink:  # else another process took it for an abandoned one, before it was locked
            return handle, Path(name)
        os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files for `path` that no process holds."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.tmp")
    for name in filter(ours.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):
            handle = os.open(path.parent / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            try:
                if lock(handle, wait=False):
                    os.unlink(path.parent / name)
            finally:
                os.close(handle)
