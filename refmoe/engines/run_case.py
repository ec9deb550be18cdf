# SPDX-License-Identifier: Apache-2.0
"""One case at one dtype on a harness: its abilities, its checkpoint, the file that comes back, the copy that is kept.

The file comes from a program that may be wrong, and that still runs while refmoe reads it. The program may also change
or remove every folder that it has heard of. So its checkpoint is looked at before each use, and written again where it
has changed; and refmoe's copies lie in a folder that no request names.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.size import total_parameters
from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.harness import Harness
from refmoe.engines.process import BROKEN, HarnessError
from refmoe.engines.protocol import UNREAD
from refmoe.engines.quantised import Quantised
from refmoe.errors import InputError
from refmoe.files.atomic import passing, replacing
from refmoe.files.safetensors_file import open_safetensors
from refmoe.files.scratch import Scratch
from refmoe.files.sentences import quoted
from refmoe.files.writable import make_folder
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.spec.taps import observable, step_of
from refmoe.suite import Case
from refmoe.traces.trace import Header, Run, Trace, write_trace
from refmoe.verifier.subject import shape_of

WIDEST = 8
"""Bytes of an element in the widest dtype."""
HELD = 1 << 22
"""The most weights of a case that are kept in memory, while its dtypes are run and judged."""
HEADER = 1 << 24
"""Bytes allowed for a file's header, with anything that a library adds to it."""


def lacks(runs: Sequence[Run], abilities: Sequence[str]) -> str | None:
    """Why a harness with these abilities cannot run a script, or None."""
    missing = sorted(needs(runs) - set(abilities))
    return f"needs {', '.join(missing)}, which the harness does not have among its abilities" if missing else None


def needs(runs: Sequence[Run]) -> set[str]:
    """The abilities that a script needs."""
    found = {run.op for run in runs} - {"prefill"}
    several = {"sequences"} if len({run.sequence for run in runs}) > 1 else set()
    return found | several | (set() if all(run.read for run in runs) else {UNREAD})


@dataclass(frozen=True)
class Places:
    """The temporary folders of a run."""

    engine: Scratch
    """For files that the engine is told of: checkpoints and its answers."""
    own: Scratch
    """For copies of its answers."""


@contextmanager
def places() -> Iterator[Places]:
    """Temporary folders for a run. Raises InputError where none can be made."""
    with Scratch("conform") as engine, Scratch("copies") as own:
        yield Places(engine, own)


def held_parameters(case: Case) -> Parameters:
    """The weights of a case, made once where they are few. Raises InputError for edits that cannot be made."""
    parameters = case.checkpoint().parameters
    if total_parameters(case.config) <= HELD:
        for weight in named_weights(parameters).values():
            weight.hold()
    return parameters


class Materialised:
    """The checkpoint of a case in a folder of its name. Use it as a context manager."""

    def __init__(self, case: Case, scratch: Scratch, layout: str, quantised: Quantised | None = None) -> None:
        """quantised: how its weights are; None: as the case has them"""
        self.case, self._scratch, self._layout, self._quantised = case, scratch, layout, quantised
        self._stack = ExitStack()
        self._path: Path | None = None
        self._state: object = None

    @cached_property
    def parameters(self) -> Parameters:
        """The weights of the case, made once where they are few. Raises InputError for edits that cannot be made."""
        return held_parameters(self.case)

    def __enter__(self) -> Materialised:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def folder(self, purpose: str) -> AbstractContextManager[Path]:
        """A new folder among those that the engine is told of."""
        return self._scratch.folder(purpose)

    def path(self) -> Path:
        """The folder, or the GGUF file. It is written at the first call, and again where it is not as it was written.

        Raises InputError or OSError where it cannot be written.
        """
        if self._path is not None and _state(self._path) == self._state:
            return self._path
        self._stack.close()
        checkpoint = self._stack.enter_context(self._scratch.folder("case")) / self.case.name
        with passing():
            self._path = self._written(checkpoint)
        self._state = _state(self._path)
        return self._path

    def _written(self, checkpoint: Path) -> Path:
        if self._quantised is not None:
            return self._quantised.write(self.case, checkpoint)
        config, parameters = self.case.config, self.parameters
        try:
            write_checkpoint(checkpoint, config, parameters, "bfloat16", self._layout)
        except InputError:  # a value that bfloat16 cannot hold
            write_checkpoint(checkpoint, config, parameters, "float32", self._layout)
        return checkpoint


def _state(checkpoint: Path) -> object:
    """A value that changes when somebody writes to a file of a checkpoint, or removes one. It does not read the files.

    checkpoint: a folder, or a file
    """
    try:
        files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
        found = [(path.name, os.lstat(path)) for path in files]
    except OSError:
        return None
    return [(name, each.st_ino, each.st_size, each.st_mode, each.st_ctime_ns) for name, each in found]


@dataclass(frozen=True)
class Labels:
    """Names in the header of a trace."""

    case: str
    policy: str


@dataclass(frozen=True)
class Received:
    """The answer of a harness."""

    trace: Trace
    unkept: str
    """A clause about a copy that could not be kept, or nothing."""


@contextmanager
def run_case(
    harness: Harness, model: Materialised, dtype: str, labels: Labels, own: Scratch, kept: Path | None = None
) -> Iterator[Received]:
    """Load the checkpoint and run the case. Yields the harness's file as a trace, which is there for this context.

    labels: for the trace's header.   own: where the copy of the harness's file is kept meanwhile
    kept: a path for a copy of the file, even of a broken one.
    Raises Refused. Raises HarnessError when a request fails or the file does not fit the request. Raises OSError when
    refmoe has no room for the checkpoint or the copy.
    """
    described, case = harness.description, model.case
    runs, checkpoint = case.runs(), model.path()
    # a new folder for each file: a process of an earlier run may still write to its own
    with model.folder("run") as temporary, own.folder("copy") as private:
        out, copy = temporary / "out.safetensors", private / "kept.safetensors"
        producer = {"name": described.name, "version": described.version}
        header = Header(runs=runs, case=labels.case, policy=labels.policy, producer=producer)
        try:
            harness.load(checkpoint, dtype)
            harness.run(runs, described.taps, out)
            trace = received(out, copy, header, case.config, described.taps)
        except InputError as error:
            reason = without_folders(str(error), {copy: "its file", out: "its file", checkpoint: checkpoint.name})
            raise HarnessError(BROKEN, reason + _keep(keep_file, copy, kept)) from None
        except HarnessError as error:
            error.reason = without_folders(error.reason, {out: "its file", checkpoint: checkpoint.name})
            raise
        yield Received(trace, _keep(keep_trace, trace, kept))


def without_folders(reason: str, names: Mapping[Path, str]) -> str:
    """A reason without the names of temporary folders, which change from run to run.   names: of some paths in them"""
    for path, name in names.items():
        reason = reason.replace(str(path), name)
    folder = re.escape(f"{tempfile.gettempdir()}/")
    return re.sub(rf"{folder}refmoe-(?:conform|copies|path)-[^\s'\"]*", "its folder", reason)


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
    """Per key of the file the most elements that its tensor may have. Intake says whether a shape fits."""
    return {
        f"{run.run}/{tap}": math.prod(shape_of(tap, config, run))
        for run in runs
        if run.read
        for tap in observable(config)
        if step_of(tap) in taps
    }


def _copy(out: Path, copy: Path, largest: int) -> None:
    """Copy an ordinary file of at most `largest` bytes. Raises InputError; OSError where there is no room."""
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
                content = source.read(status.st_size)
        finally:
            os.close(opened)
    except FileNotFoundError:
        raise InputError("it wrote no file at 'out'") from None
    except OSError as error:
        raise InputError(f"its file cannot be read: {error.strerror}") from None
    copy.write_bytes(content)


# ---- the copy that is kept (``--keep``)


def keep_folder(path: Path) -> None:
    """Make the folder where it does not exist. Raises InputError when it cannot be made or written to."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, but a folder to write traces to was expected")
    make_folder(path)
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written to: {error.strerror}") from None


def kept_name(case: str, dtype: str) -> str:
    """The name of the file in which a case at a dtype is kept."""
    return f"{case}-{dtype}.safetensors"


def kept_file(folder: Path, case: str, dtype: str) -> Path:
    """The file in which a case at a dtype is kept. Deletes the file of an earlier run, which would pass for a new one.

    Where it cannot be deleted, a new file cannot be renamed over it either, and the outcome says so.
    """
    path = folder / kept_name(case, dtype)
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return path


def _keep(keep: Callable[[Any, Path], None], given: object, path: Path | None) -> str:
    """Keep an answer, if there is a path for it.   returns: a clause that says why that failed, or nothing"""
    if path is None:
        return ""
    try:
        keep(given, path)
    except (InputError, OSError) as error:
        why = str(error).removeprefix(f"{path}: ") if isinstance(error, InputError) else error.strerror
        return f"; its trace could not be kept: {why}"
    return ""


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
    """Copy a harness's file, if there is one, whole or not at all. Raises InputError when that fails."""
    if not file.exists():
        return
    with replacing(path) as temporary:
        shutil.copyfile(file, temporary)
