"""An adapter as a command, in this or in another Python."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from refmoe.engines.serve import options_of


@contextmanager
def adapter_command(
    name: str, options: Sequence[str], python: Path | None
) -> Iterator[tuple[list[str], Mapping[str, str]]]:
    """The command that serves an adapter, and the variables by which its Python finds this refmoe.

    python: the interpreter, or None for this one.   Raises InputError for an option that is none.
    """
    options_of([*options])
    with tempfile.TemporaryDirectory(prefix="refmoe-path-") as folder:
        # a folder with refmoe alone: beside it may be packages that are made for another Python
        Path(folder, "refmoe").symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
        interpreter = sys.executable if python is None else str(python)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        yield [interpreter, "-P", "-m", "refmoe.engines.serve", name, *options], {"PYTHONPATH": path}
