"""Harnesses to begin with: they run, and skip every case until somebody writes what they are to do."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.atomic import replacing

SCAFFOLDS = {"python": "harness.py", "c": "harness.c"}
"""Per language the file here."""


def write_scaffold(language: str, path: Path) -> None:
    """Write the harness of a language, one of `SCAFFOLDS`. Raises InputError when something is at `path` already."""
    if path.exists():
        raise InputError(f"{path}: is there already, but the name of a new file was expected")
    text = files("refmoe.engines.scaffold").joinpath(SCAFFOLDS[language]).read_text(encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if language == "python":
        path.chmod(path.stat().st_mode | 0o111)  # it begins with the name of its interpreter


def usage(language: str, path: Path) -> str:
    """How the harness is run."""
    if language == "python":
        return f"refmoe conform -- python {path}"
    program = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}.out")
    return f"cc -std=c11 -Wall -Wextra -Werror -O2 -o {program} {path} -lm && refmoe conform -- {program.absolute()}"
