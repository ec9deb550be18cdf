# SPDX-License-Identifier: Apache-2.0
"""An environment for one engine: a virtual environment with the packages that its adapter pins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refmoe.errors import InputError, imported
from refmoe.files.sentences import one_line

NEEDED = ("numpy>=2.0", "ml_dtypes>=0.4.1", "safetensors>=0.6")
"""The packages that the engine's side of the protocol needs. refmoe itself is not installed there."""

Say = Callable[[str], None]
"""Called with a sentence about what is being done."""


def requirements(make: object) -> tuple[str, ...]:
    """The packages that an adapter needs, as pip takes them, each pinned; empty where it declares none."""
    declared: tuple[str, ...] = getattr(make, "requirements", ())
    return declared


def needed(module: str, adapter: str) -> Any:
    """Import a module of an adapter's engine. Raises InputError that names the command which installs it."""
    remedy = f"refmoe engines {adapter} --install DIR makes an environment for it"
    return imported(module, f"adapter '{adapter}'", remedy)


def install(name: str, make: object, folder: Path, say: Say = lambda _: None) -> Path:
    """Make a virtual environment that has an engine.

    name: of the adapter, for errors.   make: its class.   folder: new or empty
    returns: the Python of the environment, for ``refmoe conform --python``.
    Raises InputError where the adapter declares no requirements, the folder is in use, or pip fails.
    """
    if not requirements(make):
        raise InputError(
            f"adapter '{name}': declares no requirements, but a class attribute `requirements` was expected"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is in use, but a new or empty folder was expected")
    try:
        return _filled(name, make, folder, say)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half an environment would be in the way of the next try
        raise


def _filled(name: str, make: object, folder: Path, say: Say) -> Path:
    """A virtual environment in a folder that is new or empty; its Python."""
    pinned = requirements(make)
    say(f"making {folder}")
    _do([sys.executable, "-m", "venv", str(folder)], f"{folder}: cannot be made a virtual environment")
    python = folder / "bin" / "python"
    say(f"installing {', '.join(pinned)}")
    _do([str(python), "-m", "pip", "install", "--quiet", *NEEDED, *pinned], f"{folder}: pip could not install {name}")
    unwanted: tuple[str, ...] = getattr(make, "unwanted", ())
    if unwanted:
        _do([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], f"{folder}: pip could not tidy up")
    return python


def _do(command: list[str], otherwise: str) -> None:
    """Run a command whose output is shown only if it fails.   otherwise: the beginning of the error's sentence"""
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command,
        env=plain,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        wrong = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "it said nothing")
        raise InputError(f"{otherwise}: {one_line(wrong)}")
