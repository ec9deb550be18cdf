"""The folder of golden cases: inside the package, or in a clone of the repository."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from refmoe.errors import InputError

VARIABLE = "REFMOE_GOLDEN"
PACKAGE = Path(__file__).parents[1]
PACKED, CLONED = PACKAGE / "goldens", PACKAGE.parent / "golden"
"""The folder in an installed wheel, and the one in a clone."""


def golden_folder() -> Path:
    """The folder that `VARIABLE` names, else the one of the package. Raises InputError when there is none."""
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise InputError(f"{VARIABLE} is '{named}', but the folder of the golden cases was expected")
        return Path(named)
    return own_folder()


@cache
def own_folder() -> Path:
    """The folder that came with the package. Raises InputError when it is missing."""
    for folder in (PACKED, CLONED):
        if (folder / "manifest.json").exists():
            return folder
    raise InputError(
        f"{PACKED}: the golden cases are missing from this installation; {VARIABLE} can name a folder of them"
    )
