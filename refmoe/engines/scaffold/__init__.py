# SPDX-License-Identifier: Apache-2.0
"""Harnesses to begin with, in Python and in C: they run, and skip every case until somebody adds an engine."""

from __future__ import annotations

from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.reading import own_text

SCAFFOLDS = {"python": "harness.py", "c": "harness.c"}
"""Per language a file of this folder."""
LICENCE = "SPDX-License-Identifier"


def write_scaffold(language: str, path: Path) -> None:
    """Write the harness of a language, one of `SCAFFOLDS`. Raises InputError when `path` exists already.

    The file becomes the user's own work, so refmoe's line about its licence is left out.
    """
    if path.exists():
        raise InputError(f"{path}: is there already, but the name of a new file was expected")
    text = own_text("refmoe.engines.scaffold", SCAFFOLDS[language])
    text = "".join(line for line in text.splitlines(keepends=True) if LICENCE not in line)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if language == "python":
        path.chmod(path.stat().st_mode | 0o111)  # its first line names the interpreter


def usage(language: str, path: Path) -> str:
    """The command line that runs the harness, after it has built one in C."""
    if language == "python":
        return f"refmoe conform -- python {path}"
    program = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}.out")
    return f"cc -std=c11 -Wall -Wextra -Werror -O2 -o {program} {path} -lm && refmoe conform -- {program.absolute()}"
