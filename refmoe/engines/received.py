"""The file of a run: a stranger's, and the stranger still lives while it is read."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.safetensors_file import open_safetensors, quoted
from refmoe.spec.config import Config
from refmoe.spec.taps import step_of, tap_names
from refmoe.traces.trace import Header, Run, Trace
from refmoe.verify.subject import shape_of

WIDEST = 8
"""Bytes of an element in the widest dtype."""
HEADER = 1 << 24
"""Bytes for a file's header, and whatever else a library puts there."""


def received(out: Path, keep: Path, header: Header, config: Config, taps: Collection[str]) -> Trace:
    """The file that a harness wrote at `out`, copied to `keep` and opened as a trace.

    Copied, because a file that is cut short while it is mapped would end this process.
    header: of the trace; that of the file is not looked at.   taps: those asked for, without layer.
    Raises InputError when it is missing, is no file of this kind, or does not have just the taps asked for.
    """
    wanted = keys(header.runs, config, taps)
    largest = HEADER + WIDEST * sum(size for size in wanted.values())
    _copy(out, keep, largest)
    tensors, _ = open_safetensors(keep)
    for key in tensors:
        if key not in wanted:
            raise InputError(f"its file has the tensor {quoted(key)}, which was not asked for")
    for key in wanted:
        if key not in tensors:
            raise InputError(f"its file lacks the tensor {quoted(key)}, a tap that start has promised")
    return Trace(keep, header, tensors)


def keys(runs: Sequence[Run], config: Config, taps: Collection[str]) -> dict[str, int]:
    """Per key of the file how many elements it must have."""
    return {
        f"{run.run}/{tap}": math.prod(shape_of(tap, config, run))
        for run in runs
        for tap in tap_names(config)
        if step_of(tap) in taps
    }


def _copy(out: Path, keep: Path, largest: int) -> None:
    try:
        # neither a link to elsewhere is followed, nor does a pipe make us wait
        opened = os.open(out, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                raise InputError("it wrote no ordinary file at 'out'")
            if status.st_size > largest:
                raise InputError(f"its file has {status.st_size} bytes, but at most {largest} were expected")
            with os.fdopen(os.dup(opened), "rb") as source:
                keep.write_bytes(source.read(status.st_size))
        finally:
            os.close(opened)
    except FileNotFoundError:
        raise InputError("it wrote no file at 'out'") from None
    except OSError as error:
        raise InputError(f"its file cannot be read: {error.strerror}") from None
