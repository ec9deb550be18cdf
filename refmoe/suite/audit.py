# SPDX-License-Identifier: Apache-2.0
"""The proof of each clause: the code that states it, the tests and cases that name it, the mutants that break it."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refmoe.bugs.mutant import Mutant
from refmoe.errors import InputError
from refmoe.files.json_file import read_json
from refmoe.files.reading import read_text
from refmoe.suite import FAMILIES, find_cases, read_case

PACKAGE = Path(__file__).parents[1]
AREAS = {
    "spec": "model", "arithmetic": "arithmetic", "steps/sharded": "ranks", "text": "text",
    "routers/literature": "routers of the literature", "routers/contract": "router contract",
}  # fmt: skip
"""The folders whose docstrings state clauses, and the area of a clause that is stated there."""
READING_ORDER = ("config", "norm", "rope", "softmax", "attention", "router", "experts", "model")
"""The files of the specification, as `refmoe.spec` tells one to read them."""
CLAUSE = re.compile(r"(?<![\w-])([A-Z][A-Z0-9]*(?:-[A-Z]+)*)-(\d+)(?![\w-])")
STATEMENT = re.compile(rf"({CLAUSE.pattern})  +(.*)")
STATES = (ast.FunctionDef, ast.ClassDef, ast.Module)
"""The kinds of node whose docstrings state clauses."""
RANGE = re.compile(rf"({CLAUSE.pattern})(?: to |-)({CLAUSE.pattern})")


@dataclass(frozen=True)
class Coverage:
    """One clause, and everything that states, tests or breaks it."""

    clause: str
    text: str
    code: str
    """``spec/norm.py:10 rms_norm``"""
    tests: tuple[str, ...]
    """Tests that name it, ``tests/spec/test_model.py::test_name``; without a name the file's docstring does."""
    mutants: tuple[str, ...]
    """Mutants that break it."""
    killed: tuple[str, ...]
    """The mutants among them that are killed wherever a case can show them."""
    cases: tuple[str, ...]
    """Cases and files of vectors that name it."""

    @property
    def area(self) -> str:
        """One of the values of `AREAS`."""
        return next(area for folder, area in AREAS.items() if self.code.startswith(f"{folder}/"))

    @property
    def forward_pass(self) -> bool:
        """Whether it is a clause of the model itself."""
        return self.area == AREAS["spec"]

    @property
    def gaps(self) -> tuple[str, ...]:
        """The missing proof, in words. A case that names the clause is no proof, and neither is a mutant that lives."""
        if self.tests or self.killed:
            return ()
        return ("no test names it, and " + ("no mutant of it is killed" if self.mutants else "no mutant breaks it"),)


def stated(package: Path = PACKAGE) -> Iterator[tuple[str, str, str]]:
    """Every clause with its text and the place that states it, in reading order: (clause, text, place)."""
    for folder in AREAS:
        for path in sorted((package / folder).rglob("*.py"), key=reading_order):
            nodes = (n for n in ast.walk(ast.parse(read_text(path, "a source file"))) if isinstance(n, STATES))
            for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
                name = getattr(node, "name", "(module)")
                line = getattr(node, "lineno", 1)
                place = f"{path.relative_to(package)}:{line} {name}"
                yield from ((clause, text, place) for clause, text in clauses_of(ast.get_docstring(node) or ""))


def reading_order(path: Path) -> tuple[int, str]:
    """A sort key for files: those of the specification as one reads them, others by name."""
    return (READING_ORDER.index(path.stem) if path.stem in READING_ORDER else len(READING_ORDER), str(path))


def clauses_of(docstring: str) -> Iterator[tuple[str, str]]:
    """The clauses that a docstring states: an id at the start of a line, two blanks, the text, indented lines."""
    found: list[str] = []
    clause = ""
    for line in [*docstring.splitlines(), ""]:
        match = STATEMENT.match(line)
        if match or not line.startswith("  "):
            if clause:
                yield clause, " ".join(found)
            clause, found = (match.group(1), [match.group(4)]) if match else ("", [])
        elif clause:
            found.append(line.strip())


def ids_in(text: str) -> set[str]:
    """The clause ids in a text; ``CAP-1 to CAP-4`` is four of them."""
    found = {match.group() for match in CLAUSE.finditer(text)}
    for _, kind, first, _, other, last in RANGE.findall(text):
        if kind == other:
            found |= {f"{kind}-{number}" for number in range(int(first), int(last))}
    return found


def named_in(tests: Path) -> dict[str, list[str]]:
    """Per clause the tests that name it.

    A test names a clause in its source: decorators, docstring, comments. What stands elsewhere in a file of tests, or
    in a file without any, names nothing; but the docstring of a file or class of tests speaks for all that is in it.
    Raises InputError for a file that is no Python.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        name = path.relative_to(tests.parent).as_posix()
        source = read_text(path, "a source file")
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            raise InputError(f"{path}: is no Python file that can be read: {error}") from None
        for test, text in tests_of(tree, source.splitlines()) if CLAUSE.search(source) else ():
            for clause in ids_in(text):
                found.setdefault(clause, []).append(f"{name}::{test}" if test else name)
    return found


def tests_of(tree: ast.Module, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The tests of a file and their source; under the name "" the file's docstring, under a class's name its own."""
    if not any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in ast.walk(tree)):
        return
    yield "", ast.get_docstring(tree) or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield node.name, ast.get_docstring(node) or ""
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, "\n".join(lines[first - 1 : node.end_lineno])


def in_cases(golden: Path) -> dict[str, list[str]]:
    """Per clause the cases and the files of vectors that name it."""
    found: dict[str, list[str]] = {}
    for case in map(read_case, find_cases(golden, FAMILIES)):
        for clause in case.clauses:
            found.setdefault(clause, []).append(case.name)
    for path in sorted((golden / "vectors").glob("*.json")):
        named = (vector.get("clauses", []) for vector in read_json(path).values.get("vectors", []))
        for clause in sorted({clause for clauses in named for clause in clauses}):
            found.setdefault(clause, []).append(f"vectors/{path.name}")
    return found


@dataclass(frozen=True)
class Audit:
    """The table of clauses, and the mentions of clauses that are not in it."""

    rows: tuple[Coverage, ...]
    """In the order in which the clauses are stated."""
    strays: tuple[str, ...]
    """``ROUTE-9: mutant router-x``: a clause that is named there and stated nowhere."""

    @property
    def gaps(self) -> tuple[Coverage, ...]:
        return tuple(row for row in self.rows if row.gaps)


def audit(
    golden: Path, mutants: Mapping[str, Mutant], killed: Collection[str], tests: Path | None, package: Path = PACKAGE
) -> Audit:
    """The table of all clauses.

    killed: the mutants that are killed wherever a case can show them.   tests: the folder of tests, or None
    """
    by_tests = named_in(tests) if tests is not None else {}
    by_cases = in_cases(golden)
    by_mutants: dict[str, list[str]] = {}
    for each in mutants.values():
        for clause in each.breaks:
            by_mutants.setdefault(clause, []).append(each.id)
    rows: dict[str, Coverage] = {}
    for clause, text, place in stated(package):
        if clause in rows:  # said again elsewhere
            rows[clause] = replace(rows[clause], code=f"{rows[clause].code}, {place}")
            continue
        breaking, named = tuple(by_mutants.get(clause, ())), tuple(by_tests.get(clause, ()))
        seen = tuple(name for name in breaking if name in killed)
        rows[clause] = Coverage(
            clause=clause, text=text, code=place, tests=named, mutants=breaking, killed=seen,
            cases=tuple(by_cases.get(clause, ())),
        )  # fmt: skip
    families = {clause.rpartition("-")[0] for clause in rows}
    strays = [
        f"{clause}: mutant {name}" for clause, names in by_mutants.items() for name in names if clause not in rows
    ]
    for named_by in (by_tests, by_cases):
        for clause, places in named_by.items():
            # SHA-256 is no clause
            if clause not in rows and clause.rpartition("-")[0] in families:
                strays.append(f"{clause}: {places[0]}")
    return Audit(tuple(rows.values()), tuple(strays))
