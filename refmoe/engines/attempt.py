"""One case at one dtype on a harness: what it needs, the checkpoint, the file that comes back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.harness import Harness
from refmoe.engines.keeping import keep_file, keep_trace
from refmoe.engines.process import BROKEN, HarnessError
from refmoe.engines.received import received
from refmoe.errors import InputError
from refmoe.spec.model import Parameters
from refmoe.suite import Case
from refmoe.traces.trace import Header, Run, Trace


def lacks(runs: Sequence[Run], abilities: Sequence[str]) -> str | None:
    """Why a harness with these abilities cannot run a script, or None."""
    missing = sorted(needs(runs) - set(abilities))
    return f"needs {', '.join(missing)}, which the harness does not have among its abilities" if missing else None


def needs(runs: Sequence[Run]) -> set[str]:
    """The abilities that a script asks for."""
    found = {run.op for run in runs} - {"prefill"}
    return found | ({"sequences"} if len({run.sequence for run in runs}) > 1 else set())


@contextmanager
def materialised(case: Case, parameters: Parameters, folder: Path, layout: str) -> Iterator[Path]:
    """While the context lasts, the checkpoint of a case in a folder of its name."""
    with tempfile.TemporaryDirectory(prefix="case-", dir=folder) as temporary:
        checkpoint = Path(temporary, case.name)
        try:
            write_checkpoint(checkpoint, case.config, parameters, "bfloat16", layout)
        except InputError:  # a value that bfloat16 cannot hold
            write_checkpoint(checkpoint, case.config, parameters, "float32", layout)
        yield checkpoint


@contextmanager
def attempted(
    harness: Harness, case: Case, checkpoint: Path, dtype: str, policy: str, kept: Path | None = None
) -> Iterator[Trace]:
    """Load and run; while the context lasts, what the harness wrote is there as a trace of this policy.

    kept: where to keep what it wrote, whatever it is.
    Raises Refused, or HarnessError for what fails and for a file that is not what was asked for.
    """
    described, runs = harness.description, case.runs()
    # a fresh folder for each file: what a process of an earlier run still writes goes nowhere
    with tempfile.TemporaryDirectory(prefix="run-", dir=checkpoint.parent) as temporary:
        out, keep = Path(temporary, "out.safetensors"), Path(temporary, "kept.safetensors")
        header = Header(runs, case.name, None, policy, {"name": described.name, "version": described.version})
        try:
            harness.load(checkpoint, dtype)
            harness.run(runs, described.taps, out)
            trace = received(out, keep, header, case.config, described.taps)
        except InputError as error:
            if kept is not None:
                keep_file(keep, kept)
            raise HarnessError(BROKEN, _without_folders(str(error), out, keep, checkpoint)) from None
        except HarnessError as error:
            error.reason = _without_folders(error.reason, out, keep, checkpoint)
            raise
        if kept is not None:
            keep_trace(trace, kept)
        yield trace


def _without_folders(reason: str, out: Path, keep: Path, checkpoint: Path) -> str:
    """A reason without the names of temporary folders, which are others each time."""
    for path, name in ((keep, "its file"), (out, "its file"), (out.parent, "its folder")):
        reason = reason.replace(str(path), name)
    return reason.replace(str(checkpoint), checkpoint.name)
