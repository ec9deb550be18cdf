# SPDX-License-Identifier: Apache-2.0
"""Read files that a stranger names: ordinary ones only, of a stated size, and each failure is one sentence.

To open a pipe waits until another process writes to it, and a device such as /dev/zero never ends. So a file is looked
at before it is opened. No other room opens a file of a user for reading; a test holds the package to that.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from io import BufferedReader
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.sentences import one_line

LARGEST = 64 << 20
"""The largest file, in bytes, that is read as a whole: a tokenizer or the results of a large suite have fewer."""


def exists(path: Path) -> bool:
    """Whether there is such a file or folder. Raises InputError when a folder above it may not be searched.

    A link that leads nowhere is there: who reads it gets a sentence, and nothing is taken in its place.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise unreadable(path, error, "") from None
    return True


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name that can be looked at."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def need_folder(path: Path, expected: str) -> None:
    """Raises InputError when the path is no folder, or its files may not be listed.

    expected: ends the sentence, as "a checkpoint's folder"
    """
    try:
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise InputError(f"{path}: is not a folder, but {expected} was expected")
        os.scandir(path).close()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such folder, but {expected} was expected") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, expected) from None


def need_file(path: Path, expected: str) -> int:
    """The size of an ordinary file in bytes. Raises InputError for a folder, a pipe, a device, and a missing file."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error, expected) from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: is a folder, but {expected} was expected")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is no ordinary file, but {expected} was expected")
    return found.st_size


@contextmanager
def open_file(path: Path, expected: str) -> Iterator[BufferedReader]:
    """An ordinary file, open for reading. Raises InputError when it cannot be opened or read.

    expected: the kind of file, as "a safetensors file"
    """
    need_file(path, expected)
    try:
        # O_NONBLOCK: should a pipe have taken the file's place since, to open it must not wait
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path}: is no ordinary file, but {expected} was expected")
            if found.st_size == 0 and hasattr(os, "pread"):
                # some files of the system look ordinary and have nothing to read yet, such as /proc/kmsg
                os.pread(file.fileno(), 1, 0)
            yield file
    except OSError as error:
        raise unreadable(path, error, expected) from None


def read_bytes(path: Path, expected: str, largest: int = LARGEST) -> bytes:
    """The content of an ordinary file. Raises InputError when it cannot be read, or has more than `largest` bytes."""
    parts, total = list[bytes](), 0
    with open_file(path, expected) as file:
        size = os.fstat(file.fileno()).st_size
        # in parts: a buffer of the largest size would cost more than most files, and /proc tells no sizes
        while size <= largest and (part := file.read(min(max(size + 1, 1 << 16), largest + 1 - total))):
            parts.append(part)
            total += len(part)
    if max(size, total) > largest:
        raise InputError(f"{path}: has more than {largest:,} bytes, but {expected} of at most that size was expected")
    return b"".join(parts)


def read_text(path: Path, expected: str, largest: int = LARGEST) -> str:
    """The text of an ordinary file in UTF-8, with or without a byte order mark. Raises InputError as `read_bytes`."""
    return decoded(path, read_bytes(path, expected, largest), expected)


def decoded(path: Path, content: bytes, expected: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark. Raises InputError for bytes that are not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8, but {expected} in UTF-8 was expected") from None


def unreadable(path: Path, error: Exception, expected: str) -> InputError:
    """The sentence for an error of the operating system."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return InputError(f"{path}: no such file, but {expected} was expected")
    if isinstance(error, PermissionError):
        return InputError(f"{path}: cannot be read: permission denied")
    # a path with a NUL character raises ValueError
    return InputError(f"{path}: cannot be read: {one_line(getattr(error, 'strerror', None) or error)}")


def system_text(path: str) -> str:
    """The text of a file of the operating system, such as /proc/meminfo; empty where there is no such file."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def own_text(package: str, name: str) -> str:
    """The text of a file that is part of refmoe, such as a template."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
