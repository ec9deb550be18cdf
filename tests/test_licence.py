# SPDX-License-Identifier: Apache-2.0
"""Every source file says its licence in a line that tools read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = {
    ".py": "# {}", ".cu": "// {}", ".c": "// {}", ".js": "// {}", ".css": "/* {} */",
}  # fmt: skip
"""Per kind of source file the first line, after the line that names an interpreter if there is one."""
IDENTIFIER = "SPDX-License-Identifier: Apache-2.0"


def sources() -> list[str]:
    """The source files of the repository, by their path in it."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no clone: git does not list its files")
    return [name for name in listed.stdout.splitlines() if Path(name).suffix in LINES and (ROOT / name).exists()]


def test_every_source_file_names_its_licence_first() -> None:
    found = sources()
    assert len(found) > 300
    missing = []
    for name in found:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        first = lines[1:2] if lines and lines[0].startswith("#!") else lines[:1]
        if first != [LINES[Path(name).suffix].format(IDENTIFIER)]:
            missing.append(name)
    assert missing == []
