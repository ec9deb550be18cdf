# SPDX-License-Identifier: Apache-2.0
"""Places in an engine's source: the line at which a wrong step is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from refmoe.engines.protocol import EVERY_TAP
from refmoe.errors import InputError
from refmoe.files.numbers import integer
from refmoe.files.reading import exists, read_text
from refmoe.files.sentences import quoted

EXPECTED = "a source file of the engine"


@dataclass(frozen=True)
class Place:
    """A line of a file."""

    uri: str
    """The file, relative to the root of the repository, as a URI."""
    line: int
    """From 1."""
    end: int
    """The column after the last character of the line. Columns count characters, from 1."""


@dataclass(frozen=True)
class Sources:
    """The places of an engine's steps."""

    steps: Mapping[str, Place]
    rest: Place
    """The place of every other step, and of a failure that is no step's."""

    def of(self, step: str) -> Place:
        """The place of a step."""
        return self.steps.get(step, self.rest)


def read_sources(given: Iterable[str], candidates: Sequence[Path]) -> Sources:
    """The places that a user names.

    given: each ``STEP=FILE:PLACE``, or ``FILE:PLACE`` for all other steps. PLACE is the number of a line, or a text in
        the line; without it, the first line. FILE is relative to the current folder.
    candidates: files for all other steps where none is given. The first one counts that is a text of a repository.
    Raises InputError where a step, a file or a line does not exist, and where no place is left for the other steps.
    """
    steps: dict[str, Place] = {}
    rest: Place | None = None
    for each in given:
        step, where = _parts(each)
        if step in steps or (step == "" and rest is not None):
            raise InputError(f"--source {quoted(each)}: {step or 'all other steps'} has a place already")
        found = _place(where)
        if step:
            steps[step] = found
        else:
            rest = found
    if rest is None:
        rest = _first(candidates)
    if rest is None:
        raise InputError(
            "--sarif shows each result at a line of the repository, but it has none: --source FILE, a file of the "
            "engine, was expected"
        )
    return Sources(steps, rest)


def repository(file: Path) -> Path:
    """The root of the repository that a file belongs to; the current folder where it belongs to none."""
    return next((folder for folder in file.parents if exists(folder / ".git")), Path.cwd().resolve())


def _parts(given: str) -> tuple[str, str]:
    """The step, or an empty text, and the rest."""
    step, equals, where = given.partition("=")
    if not equals or step not in EVERY_TAP:
        if equals and not exists(Path(given.partition(":")[0])):
            raise InputError(
                f"--source {quoted(given)}: one of the steps {', '.join(EVERY_TAP)} was expected before '='"
            )
        return "", given
    return step, where


def _place(where: str) -> Place:
    parts = where.split(":")
    names = [":".join(parts[:count]) for count in range(len(parts), 0, -1)]  # a name may have a colon, as a text may
    name = next((each for each in names if exists(Path(each))), parts[0])
    wanted = where.removeprefix(name)[1:]
    path = Path(name)
    text = read_text(path, EXPECTED)
    # as GitHub counts lines: of the characters at which Python ends one, only this one does
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    number = integer(wanted)
    if wanted and number is None:
        number = next((i for i, line in enumerate(lines, 1) if wanted in line), None)
        if number is None:
            raise InputError(f"{path}: no line has {quoted(wanted)}, but --source names one")
    number = 1 if number is None else number
    if not 1 <= number <= len(lines):
        raise InputError(f"{path}: has {len(lines)} lines, but --source names line {number}")
    real = path.resolve()  # GitHub shows no link
    root = repository(real)
    if not real.is_relative_to(root):
        raise InputError(
            f"{path}: lies in no repository and outside of {root}, but a file of the repository was expected"
        )
    return Place(uri=quote(real.relative_to(root).as_posix()), line=number, end=len(lines[number - 1]) + 1)


def _first(candidates: Sequence[Path]) -> Place | None:
    """The first line of the first candidate that can be shown."""
    for path in candidates:
        try:
            return _place(str(path))
        except InputError:  # a program, or no file at all
            continue
    return None
