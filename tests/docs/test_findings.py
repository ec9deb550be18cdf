# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/findings: each has a script that needs its engine alone, and shows what the script prints."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/findings").glob("*.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def block(page: Path, language: str) -> str:
    """The only block of a language on a page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(found)


def versions(page: Path) -> dict[str, str]:
    """Per package the version that was measured."""
    (line,) = re.findall(r"^Versions: (.*)\.$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(each.split(" ") for each in line.split(", "))


def imported(script: str) -> set[str]:
    """The packages that a script imports, without those of Python."""
    nodes = list(ast.walk(ast.parse(script)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pages
def test_a_page_has_all_that_a_maintainer_needs(page: Path) -> None:
    text, script = page.read_text(encoding="utf-8"), block(page, "python")
    assert versions(page)
    assert "**Cause.**" in text
    assert "refmoe" not in imported(script)
    assert block(page, "text").strip()
    listed = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    assert f"(findings/{page.name})" in listed


@pages
def test_the_script_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    """Where the engine is there in the version that was measured: a later one may have mended it."""
    for package, measured in versions(page).items():
        try:
            found = version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        if found.partition("+")[0] != measured:
            pytest.skip(f"{package} is {found} and not {measured}")
    script = block(page, "python")
    missing = [name for name in imported(script) if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout == block(page, "text")
