# SPDX-License-Identifier: Apache-2.0
"""Programs of others that judge files of CI systems, found beside this Python or on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def program(name: str) -> str:
    """The path of a program. Skips the test where there is none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"the program {name} is not installed")
    return found


def complaints(words: Sequence[str]) -> str:
    """All that a program prints about a file, empty where it has nothing against it."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr or f"status {done.returncode}"


def schema_faults(schema: str, file: Path) -> str:
    """The faults of a file by a schema of SchemaStore, such as ``vendor.github-workflows``."""
    pytest.importorskip("check_jsonschema")
    return complaints([sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)])


def shell_faults(script: str, folder: Path, shell: str = "bash") -> str:
    """The faults that ShellCheck finds in a script. A text in single quotes may look like an expression."""
    path = folder / "script.sh"
    path.write_text(script, encoding="utf-8")
    return complaints([program("shellcheck"), "--severity=style", f"--shell={shell}", "--exclude=SC2016", str(path)])
