"""The spec can be read in one sitting, knows no array library, and numbers its clauses once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

SPEC = Path(__file__).parent.parent.parent / "refmoe" / "spec"
ALLOWED = {"__future__", "collections.abc", "dataclasses", "math", "typing"}


def test_the_spec_is_under_700_lines() -> None:
    """P1."""
    assert sum(len(path.read_text().splitlines()) for path in SPEC.glob("*.py")) < 700


def test_the_spec_imports_nothing_but_itself() -> None:
    """Design section 2: no array library and none of its neighbours."""
    for path in SPEC.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name in ALLOWED or name.startswith("refmoe.spec."), f"{path.name} imports {name}"


def test_every_clause_is_stated_once() -> None:
    """An id is stated where it stands at the start of a docstring's line."""
    text = "\n".join(path.read_text() for path in SPEC.glob("*.py"))
    stated = Counter(re.findall(r"^    ([A-Z]+-\d+)  ", text, re.MULTILINE))
    assert len(stated) >= 30
    assert set(stated.values()) == {1}
    for family in {clause.partition("-")[0] for clause in stated}:
        numbers = sorted(int(clause.partition("-")[2]) for clause in stated if clause.startswith(family + "-"))
        assert numbers == list(range(1, len(numbers) + 1)), family
