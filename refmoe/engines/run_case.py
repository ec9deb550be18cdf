# SPDX-License-Identifier: Apache-2.0
"""One case at one dtype on a harness: its abilities, its checkpoint, the file that comes back, the copy that is kept.

The file comes from a program that may be wrong, and that still runs while refmoe reads it.
"""

from __future__ import annotations

import math
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.harness import Harness
from refmoe.engines.process import BROKEN, HarnessError
from refmoe.errors import InputError
from refmoe.files.safetensors_file import open_safetensors
from refmoe.files.sentences import quoted
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.spec.taps import step_of, tap_names
from refmoe.suite import Case
from refmoe.traces.trace import Header, Run, Trace, write_trace
from refmoe.verifier.subject import shape_of

WIDEST = 8
"""Bytes of an element in the widest dtype."""
HEADER = 1 << 24
"""Bytes allowed for a file's header, with anything that a library adds to it."""


def lacks(runs: Sequence[Run], abilities: Sequence[str]) -> str | None:
    """Why a harness with these abilities cannot run a script, or None."""
    missing = sorted(needs(runs) - set(abilities))
    return f"needs {', '.join(missing)}, which the harness does not have among its abilities" if missing else None


def needs(runs: Sequence[Run]) -> set[str]:
    """The abilities that a script needs."""
    found = {run.op for run in runs} - {"prefill"}
    return found | ({"sequences"} if len({run.sequence for run in runs}) > 1 else set())


@contextmanager
def materialised(case: Case, parameters: Parameters, folder: Path, layout: str) -> Iterator[Path]:
    """While the context lasts, the checkpoint of a case is in a folder of its name. Yields that folder."""
    with tempfile.TemporaryDirectory(prefix="case-", dir=folder) as temporary:
        checkpoint = Path(temporary, case.name)
        try:
            write_checkpoint(checkpoint, case.config, parameters, "bfloat16", layout)
        except InputError:  # a value that bfloat16 cannot hold
            write_checkpoint(checkpoint, case.config, parameters, "float32", layout)
        yield checkpoint


@contextmanager
def run_case(
    harness: Harness, case: Case, checkpoint: Path, dtype: str, policy: str, kept: Path | None = None
) -> Iterator[Trace]:
    """Load the checkpoint and run the case. Yields the harness's file as a trace, which is there for this context.

    policy: a name for the trace's header.   kept: a path for a copy of the file, even of a broken one.
    Raises Refused. Raises HarnessError when a request fails or the file does not fit the request.
    """
    described, runs = harness.description, case.runs()
    # a new folder for each file: a process of an earlier run may still write to its own
    with tempfile.TemporaryDirectory(prefix="run-", dir=checkpoint.parent) as temporary:
        out, copy = Path(temporary, "out.safetensors"), Path(temporary, "kept.safetensors")
        producer = {"name": described.name, "version": described.version}
        header = Header(runs=runs, case=case.name, policy=policy, producer=producer)
        try:
            harness.load(checkpoint, dtype)
            harness.run(runs, described.taps, out)
            trace = received(out, copy, header, case.config, described.taps)
        except InputError as error:
            if kept is not None:
                keep_file(copy, kept)
            raise HarnessError(BROKEN, _without_folders(str(error), out, copy, checkpoint)) from None
        except HarnessError as error:
            error.reason = _without_folders(error.reason, out, copy, checkpoint)
            raise
        if kept is not None:
            keep_trace(trace, kept)
        yield trace


def _without_folders(reason: str, out: Path, copy: Path, checkpoint: Path) -> str:
    """A reason without the names of temporary folders, which change from run to run."""
    for path, name in ((copy, "its file"), (out, "its file"), (out.parent, "its folder")):
        reason = reason.replace(str(path), name)
    return reason.replace(str(checkpoint), checkpoint.name)


# ---- the file that the harness wrote


def received(out: Path, copy: Path, header: Header, config: Config, taps: Collection[str]) -> Trace:
    """Copy the harness's file from `out` to `copy`, and open the copy as a trace.

    A copy, because this process would die if somebody shortened the file while it is mapped.
    header: of the trace; metadata in the file is ignored.   taps: the taps of the request, without layer.
    Raises InputError when the file is missing, is not safetensors, or has other tensors than the taps requested.
    """
    wanted = elements_per_key(header.runs, config, taps)
    _copy(out, copy, HEADER + WIDEST * sum(wanted.values()))
    tensors, _ = open_safetensors(copy)
    for key in tensors:
        if key not in wanted:
            raise InputError(f"its file has the tensor {quoted(key)}, which was not asked for")
    for key in wanted:
        if key not in tensors:
            raise InputError(f"its file lacks the tensor {quoted(key)}, a tap that start has promised")
    return Trace(copy, header, tensors)


def elements_per_key(runs: Sequence[Run], config: Config, taps: Collection[str]) -> dict[str, int]:
    """Per key of the file the number of elements that its tensor must have."""
    return {
        f"{run.run}/{tap}": math.prod(shape_of(tap, config, run))
        for run in runs
        for tap in tap_names(config)
        if step_of(tap) in taps
    }


def _copy(out: Path, copy: Path, largest: int) -> None:
    """Copy an ordinary file of at most `largest` bytes. Raises InputError."""
    try:
        # a link is not followed, and a pipe does not block
        opened = os.open(out, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                raise InputError("it wrote no ordinary file at 'out'")
            if status.st_size > largest:
                raise InputError(f"its file has {status.st_size} bytes, but at most {largest} were expected")
            with os.fdopen(os.dup(opened), "rb") as source:
                copy.write_bytes(source.read(status.st_size))
        finally:
            os.close(opened)
    except FileNotFoundError:
        raise InputError("it wrote no file at 'out'") from None
    except OSError as error:
        raise InputError(f"its file cannot be read: {error.strerror}") from None


# ---- the copy that is kept (``--keep``)


def keep_folder(path: Path) -> None:
    """Make the folder where it does not exist. Raises InputError when it cannot be made or written to."""
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
    """The file in which a case at a dtype is kept. Deletes the file of an earlier run, which would pass for a new one.

    Raises InputError when that file cannot be deleted.
    """
    path = folder / f"{case}-{dtype}.safetensors"
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be removed: {error.strerror}") from None
    return path


def keep_trace(trace: Trace, path: Path) -> None:
    """Write a harness's arrays with a trace's header, so that `refmoe verify` reads them.

    A file that cannot be a trace, such as one with an unknown dtype, is copied unchanged.
    Raises InputError when the file cannot be written.
    """
    try:
        write_trace(path, trace.header, {key: tensor.map() for key, tensor in trace.tensors.items()})
    except InputError:
        keep_file(trace.path, path)


def keep_file(file: Path, path: Path) -> None:
    """Copy a harness's file, if there is one. Raises InputError when the copy cannot be written."""
    if not file.exists():
        return
    try:
        shutil.copyfile(file, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
