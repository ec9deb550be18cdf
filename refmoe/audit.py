"""What proves each clause: the code that states it, the tests that name it, the mutants that break it, the cases that
exercise it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refmoe.golden.case import Case
from refmoe.mutants.mutant import Mutant

PACKAGE = Path(__file__).parent
STATED_IN = ("spec", "text", "routing", "sharding")
"""The packages whose docstrings state clauses."""
CLAUSE = re.compile(r"[A-Z][A-Z0-9]*(?:-[A-Z]+)*-\d+")


@dataclass(frozen=True)
class Coverage:
    """One clause and all that speaks of it."""

    clause: str
    text: str
    code: str
    """``spec/norm.py:10 rms_norm``"""
    tests: tuple[str, ...]
    """Test files that name it."""
    mutants: tuple[str, ...]
    cases: tuple[str, ...]

    @property
    def gaps(self) -> tuple[str, ...]:
        """What is lacking, in words."""
        proof = self.tests or self.mutants
        return () if proof else ("no test and no mutant names it",)


def stated(package: Path = PACKAGE) -> Iterator[tuple[str, str, str]]:
    """Every clause with its text and the place that states it: (clause, text, place)."""
    for folder in STATED_IN:
        for path in sorted((package / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    name = getattr(node, "name", "(module)")
                    line = getattr(node, "lineno", 1)
                    place = f"{path.relative_to(package)}:{line} {name}"
                    yield from ((clause, text, place) for clause, text in clauses_of(ast.get_docstring(node) or ""))


def clauses_of(docstring: str) -> Iterator[tuple[str, str]]:
    """The clauses that a docstring states: an id at the start of a line, two blanks, the text, indented lines of it."""
    found: list[str] = []
    clause = ""
    for line in [*docstring.splitlines(), ""]:
        match = re.match(rf"({CLAUSE.pattern})  +(.*)", line)
        if match or not line.startswith("  "):
            if clause:
                yield clause, " ".join(found)
            clause, found = (match.group(1), [match.group(2)]) if match else ("", [])
        elif clause:
            found.append(line.strip())


def named_in(tests: Path) -> dict[str, list[str]]:
    """Per clause the test files that name it."""
    found: dict[str, list[str]] = {}
    for path in sorted(tests.rglob("*.py")):
        for clause in sorted(set(CLAUSE.findall(path.read_text()))):
            found.setdefault(clause, []).append(str(path.relative_to(tests.parent)))
    return found


def coverage(cases: Iterable[Case], mutants: Mapping[str, Mutant], tests: Path | None) -> list[Coverage]:
    """The table, in the order in which the clauses are stated.   tests: their folder, or None where there is none."""
    in_tests = named_in(tests) if tests is not None else {}
    in_cases: dict[str, list[str]] = {}
    for case in cases:
        for clause in case.clauses:
            in_cases.setdefault(clause, []).append(case.name)
    rows = []
    for clause, text, place in stated():
        breaking = tuple(each.id for each in mutants.values() if clause in each.breaks)
        rows.append(
            Coverage(clause, text, place, tuple(in_tests.get(clause, ())), breaking, tuple(in_cases.get(clause, ())))
        )
    return rows


def unknown(rows: Sequence[Coverage], mutants: Mapping[str, Mutant]) -> list[str]:
    """Clauses that mutants claim to break and nobody states: ``mutant: clause``."""
    known = {row.clause for row in rows}
    return [f"{each.id}: {clause}" for each in mutants.values() for clause in each.breaks if clause not in known]
