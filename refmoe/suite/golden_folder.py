# SPDX-License-Identifier: Apache-2.0
"""The folder of golden cases: inside the package, or in a clone of the repository."""

from __future__ import annotations

import os
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from refmoe.errors import InputError
from refmoe.suite.case import CASE_FILE

VARIABLE = "REFMOE_GOLDEN"
PACKAGE = Path(__file__).parents[1]
PACKED, CLONED = PACKAGE / "goldens", PACKAGE.parent / "golden"
"""The folder in an installed wheel, and the one in a clone."""


def golden_folder(given: Path | None = None) -> Path:
    """The folder given, else the one that `VARIABLE` names, else the one of the package.

    Raises InputError when `VARIABLE` names no folder, or the package has none.
    """
    if given is not None:
        return given
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise InputError(f"{VARIABLE} is '{named}', but the folder of the golden cases was expected")
        return Path(named)
    return own_folder()


def case_folders(golden: Path) -> dict[str, Path]:
    """The folder of each case of any size, by its name. Raises InputError when there is no case.

    golden: the folder of cases, or the folder of one case
    """
    if (golden / CASE_FILE).exists():
        return {golden.resolve().name: golden}
    found = {path.parent.name: path.parent for path in sorted(golden.glob(f"*/{CASE_FILE}"))}
    if not found:
        raise InputError(f"{golden}: no case is there; folders with a {CASE_FILE} were expected")
    return found


def case_folder(name: str, golden: Path) -> Path:
    """The folder of a case in a golden folder. Raises InputError, with similar names, when there is none."""
    if name == Path(name).name and (golden / name / CASE_FILE).is_file():
        return golden / name
    names = case_folders(golden)
    similar = get_close_matches(name[:200], names, n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else f"`refmoe cases` lists all {len(names)}"
    raise InputError(f"case '{name}' is unknown in {golden}; {hint}")


@cache
def own_folder() -> Path:
    """The folder that came with the package. Raises InputError when it is missing."""
    for folder in (PACKED, CLONED):
        if (folder / "manifest.json").exists():
            return folder
    raise InputError(
        f"{PACKED}: the golden cases are missing from this installation; {VARIABLE} can name a folder of them"
    )
