# SPDX-License-Identifier: Apache-2.0
"""Temporary folders of a run: locked while it lives, made anew when an engine removes them, removed at the end.

A process that is killed leaves its folder. The next run removes it: a folder of this user whose lock nobody holds.
The lock is on the folder itself (flock), so that no file in it can be lost.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from refmoe.errors import InputError
from refmoe.files.lock import lock

YOUNGEST = 10.0
"""Seconds since the last change of a folder that is removed: between its creation and its lock there is a moment."""
PATIENCE, IMPATIENCE = 30.0, 1.0
"""Seconds for the removal of a whole folder, and of one in it, to which an engine may go on writing."""


class Scratch:
    """A temporary folder of this run. Use it as a context manager."""

    def __init__(self, purpose: str) -> None:
        """Remove what killed runs have left, and make a folder. Raises InputError where none can be made.

        purpose: a part of the folder's name
        """
        self._prefix = f"refmoe-{purpose}-"
        remove_abandoned(self._prefix)
        self._lock = -1
        try:
            self._make()
        except OSError as error:
            folder = tempfile.gettempdir()
            raise InputError(f"{folder}: a temporary folder cannot be made there: {error.strerror}") from None

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        remove_tree(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _make(self) -> None:
        # an engine may have removed the folder for temporary files as well
        Path(tempfile.gettempdir()).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=self._prefix)).absolute()
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        lock(self._lock, wait=False)  # where there are no locks, as on some network disks, nobody removes the folder

    @property
    def whole(self) -> bool:
        """Whether the folder is still the one that was made, and can be written to."""
        try:
            now, made = os.lstat(self.path), os.fstat(self._lock)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino) and stat.S_IMODE(now.st_mode) & 0o700 == 0o700

    @contextmanager
    def folder(self, purpose: str) -> Iterator[Path]:
        """Yield a new folder in it, which is removed afterwards. Raises OSError where there is no room."""
        if not self.whole:
            self.close()
            self._make()
        made = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=self.path))
        try:
            yield made
        finally:
            remove_tree(made, IMPATIENCE)


def remove_abandoned(prefix: str) -> None:
    """Remove the folders for temporary files with this prefix that killed runs of this user have left."""
    with suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            with suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    found = os.lstat(path)
    # the time of the last change of the inode, which a program cannot set
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or time.time() - found.st_ctime < YOUNGEST:
        return
    if stat.S_IMODE(found.st_mode) & 0o700 != 0o700:
        os.chmod(path, 0o700)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if lock(handle, wait=False):  # else a run that lives holds it
            remove_tree(path)
    finally:
        os.close(handle)


def remove_tree(path: Path, patience: float = PATIENCE) -> None:
    """Remove a folder with all that a stranger may have put there. Never raises OSError.

    patience: seconds after which it gives up

    Folders may be nested more deeply than a path can be long, and closed to their owner. So what is two levels down is
    moved up first, until there is nothing below. Links are removed and not followed.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                return
            os.chmod(path, 0o700)
            if _remove_first_level(path):
                os.rmdir(path)
                return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                return


def _remove_first_level(path: Path) -> bool:
    """Remove files and folders from a folder, and move the folders of its folders into it.

    returns: whether none were moved. Raises OSError.
    """
    empty = True
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            with os.scandir(entry.path) as inner:
                for each in inner:
                    if each.is_dir(follow_symlinks=False):
                        os.chmod(each.path, 0o700)
                        os.rename(each.path, path / f"up-{uuid4().hex}")
                        empty = False
                    else:
                        os.unlink(each.path)
            os.rmdir(entry.path)
    return empty
