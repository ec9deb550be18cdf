# SPDX-License-Identifier: Apache-2.0
"""One command at a time in a folder that a command fills: a second, equal one waits, and then does its own work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refmoe.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(handle: int, wait: bool = True) -> bool:
    """Lock an open file or folder until its handle is closed. Returns whether it is locked.

    wait: whether to wait while another process holds it
    There are no locks on Windows and on some network file systems.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there; its parent must exist. Wait while another process holds it.

    The operating system gives the folder free when this process ends in any way. The body may remove the folder.
    Where there are no locks, as on Windows and on some network file systems, nobody waits.
    Raises InputError when the folder cannot be made or read.
    """
    try:
        while True:
            folder.mkdir(exist_ok=True)
            if fcntl is None:
                break
            handle = os.open(folder, os.O_RDONLY)
            lock(handle)
            if _is(folder, handle):
                break
            os.close(handle)  # the process that held it has removed it
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from None
    try:
        yield
    finally:
        if fcntl is not None:
            os.close(handle)


def _is(folder: Path, handle: int) -> bool:
    """Whether the path still names the open folder."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
