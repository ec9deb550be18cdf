# SPDX-License-Identifier: Apache-2.0
"""Every command of refmoe: its outputs are checked against its inputs before it runs, and while it runs.

A command declares its outputs by their types. Every other value that names a file or folder is an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import click

from refmoe.api.arguments import path_of
from refmoe.errors import require
from refmoe.files.writable import protecting, refuse_outputs


class Output(click.Path):
    """The path of a file that a command writes."""


class Page(Output):
    """The path of a page in HTML that a command writes."""


class OutputFolder(click.Path):
    """The path of a folder that a command fills."""


OUTPUT = Output(path_type=Path)
PAGE = Page(path_type=Path)
OUTPUT_FOLDER = OutputFolder(path_type=Path)


class GuardedCommand(click.Command):
    """A command whose outputs cannot replace its inputs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Check the outputs, then run the command. Raises InputError."""
        files: list[Path] = []
        folders: list[Path] = []
        inputs: list[Path] = []
        for parameter in self.params:
            kinds = parameter.type.types if isinstance(parameter.type, click.Tuple) else [parameter.type]
            kind = next((each for each in kinds if isinstance(each, Output | OutputFolder)), None)
            values = [*_flat(ctx.params.get(str(parameter.name)))]
            paths = [value for value in values if isinstance(value, Path)]
            if kind is None:
                inputs += _paths(values)
            else:
                for path in paths:
                    path_of(path, parameter.opts[0])
                (folders if isinstance(kind, OutputFolder) else files).extend(paths)
            if isinstance(kind, Page) and paths:
                require("jinja2", "html", f"the page of {parameter.opts[0]}")
        with protecting(inputs):
            refuse_outputs(files, folders)
            return super().invoke(ctx)


def _flat(value: Any) -> Iterator[Any]:
    """The single values of an option that may be given several times or take several."""
    if isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_flat, value))
    elif value is not None:
        yield value


def _paths(values: Iterable[Any]) -> Iterator[Path]:
    """The files and folders that values name.

    They stand alone, after ``DTYPE=`` or ``STEP=``, and before ``+change`` or ``:PLACE``.
    """
    for value in values:
        if isinstance(value, Path | str) and str(value):
            text = str(value)
            named = {text, text.partition("=")[2]}
            parts = named | {part.partition(mark)[0] for part in named for mark in "+:"}
            parts -= {"", ".", "/"}
            yield from (Path(part) for part in parts if _is_there(Path(part)))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
