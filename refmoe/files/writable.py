# SPDX-License-Identifier: Apache-2.0
"""A check that a file can be written, before hours of work rather than after them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from refmoe.errors import InputError


def refuse_output(path: Path, source: Path | None = None) -> None:
    """Raises InputError when a file cannot be written to this path.

    source: an input that must not be overwritten, or None
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, but the name of a file to write was expected")
        if source is not None and path.exists() and source.exists() and path.samefile(source):
            raise InputError(f"{path}: is the trace itself, but another file to write was expected")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
