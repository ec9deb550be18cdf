"""What an engine returned, kept for a closer look (``--keep``)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from refmoe.errors import InputError
from refmoe.traces.trace import Trace, write_trace


def keep_folder(path: Path) -> None:
    """Make the folder where it is not there yet. Raises InputError when it cannot be one, or be written to."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, but a folder to write traces to was expected")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written to: {error.strerror}") from None


def kept_file(folder: Path, case: str, dtype: str) -> Path:
    """Where a case at a dtype is kept. What an earlier run left there goes away: it would pass for this one's.

    Raises InputError when it cannot go away.
    """
    path = folder / f"{case}-{dtype}.safetensors"
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be removed: {error.strerror}") from None
    return path


def keep_trace(trace: Trace, path: Path) -> None:
    """Write what a harness returned with the header that it lacks, so that `refmoe verify` reads it.

    What cannot be written as a trace, such as a tensor of an unknown dtype, is kept as it came. Raises InputError when
    the file cannot be written.
    """
    try:
        write_trace(path, trace.header, {key: tensor.map() for key, tensor in trace.tensors.items()})
    except InputError:
        keep_file(trace.path, path)


def keep_file(file: Path, path: Path) -> None:
    """Copy what a harness returned, if it did. Raises InputError when the copy cannot be written."""
    if not file.exists():
        return
    try:
        shutil.copyfile(file, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
