# SPDX-License-Identifier: Apache-2.0
"""The spec can be read in one sitting, knows no array library, and numbers its clauses once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from refmoe import spec
from refmoe.suite import audit

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


def test_clauses_are_numbered_in_reading_order() -> None:
    """Also the files are read in the order that the package's docstring gives."""
    clauses = [clause for clause, _, place in audit.stated() if place.startswith("spec/")]
    assert clauses[0] == "CONFIG-1"
    assert clauses[-1] == "MODEL-5"
    for family in {clause.partition("-")[0] for clause in clauses}:
        numbers = [int(clause.partition("-")[2]) for clause in clauses if clause.startswith(family + "-")]
        assert numbers == list(range(1, len(numbers) + 1)), family
    order = [name for name in re.findall(r"`(\w+)`", spec.__doc__ or "") if name in audit.READING_ORDER]
    assert order == [*audit.READING_ORDER]


def test_no_signature_of_the_spec_says_any() -> None:
    for path in SPEC.glob("*.py"):
        assert "Any" not in {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}, path.name
