# SPDX-License-Identifier: Apache-2.0
"""New cases: a case of the user's own dimensions, with its golden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from refmoe.checkpoints.configuration import REAL, ConfigError, checked
from refmoe.checkpoints.hf import read_config
from refmoe.errors import InputError
from refmoe.files.numbers import decimal, integer
from refmoe.spec.config import PRESETS, Config
from refmoe.suite import SMALL, Case, read_case
from refmoe.suite.golden_folder import case_folder, golden_folder
from refmoe.suite.new import New, write_new_case
from refmoe.traces.script import Call

Names = Sequence[str]
__all__ = ["PRESETS", "SMALL", "Call", "Wanted", "new_case"]


@dataclass(frozen=True)
class Wanted:
    """A case that a user wants, before its parts are checked."""

    name: str
    like: str = "walking-skeleton"
    """The case or published size whose configuration it has."""
    config: Path | None = None
    """A config.json in its place."""
    changes: Names = ()
    """Changes of that configuration, each ``field=value``."""
    seed: int = 1
    calls: tuple[Call, ...] = ()
    why: str = ""
    family: str = SMALL

    def checked_config(self) -> Config:
        """The configuration. Raises InputError for a field or value that a Mixtral cannot have."""
        if self.config is not None:
            values = asdict(read_config(self.config).config)
        elif self.like in PRESETS:
            values = asdict(PRESETS[self.like])
        else:
            values = asdict(read_case(case_folder(self.like, golden_folder())).config)
        for change in self.changes:
            field, _, value = change.partition("=")
            if field not in values:
                raise InputError(f"--set {change}: one of {', '.join(values)} was expected before '='")
            values[field] = _number(change, field, value)
        try:
            return checked(values)
        except ConfigError as error:
            raise InputError(f"the configuration of the new case: {error}") from None


def _number(change: str, field: str, value: str) -> int | float | None:
    """The value of a change. Raises InputError where it is no number."""
    if field == "window" and value == "none":
        return None
    number = decimal(value) if field in REAL else integer(value)
    if number is None:
        raise InputError(f"--set {change}: a number was expected after '='")
    return number


def new_case(golden: Path, wanted: Wanted) -> Case:
    """Write a new case into a folder of cases: its definition, its golden and its manifest.

    golden: a folder of the user's own, which is made where it does not exist
    Raises InputError for a case that cannot be made; then nothing of it is left.
    """
    new = New(
        name=wanted.name,
        config=wanted.checked_config(),
        seed=wanted.seed,
        calls=wanted.calls,
        why=wanted.why,
        family=wanted.family,
    )
    return write_new_case(golden, new)
