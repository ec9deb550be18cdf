# SPDX-License-Identifier: Apache-2.0
"""``refmoe suite audit``: every clause of this repository is proven, and a clause that is not is reported.

The clauses of these tests are made up: what a test of the audit names must not count as proof of anything.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.suite import find_cases
from refmoe.suite.audit import Audit, audit, clauses_of, ids_in, named_in
from refmoe.suite.matrix import dependencies as sources
from refmoe.suite.matrix.file import MATRIX_FILE, read_matrix, write_matrix
from refmoe.suite.matrix.outcomes import POLICIES
from refmoe.suite.matrix.summary import summarise
from tests.bugs.sample_matrix import all_killed, golden_folder
from tests.command_line import Refmoe

REPOSITORY = Path(__file__).parents[1]
TESTS = REPOSITORY / "tests"
GOLDEN = REPOSITORY / "golden"
MATRIX = GOLDEN / MATRIX_FILE

STATED = '''
def step(x):
    """What a step computes.

    MADE-1  The first,
            on two lines.
    MADE-2  The second.

    MADE-1 and MADE-2 are named here, and MADE-3 too, but not stated.
    """
'''


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return golden_folder(tmp_path / "golden")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    for name in ("golden", "tests", "package/spec", "package/text"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "package" / "spec" / "step.py").write_text(STATED)


def breaking(*clauses: str) -> dict[str, Mutant]:
    """One mutant, of these clauses."""
    return {"a-bug": replace(MUTANTS["attn-gqa-tile"], id="a-bug", breaks=clauses)}


def audited(folder: Path, mutants: dict[str, Mutant], killed: set[str], tests: str = "") -> Audit:
    """The audit of the made-up package, with a file of tests."""
    golden_folder(folder / "golden")
    (folder / "tests" / "test_step.py").write_text(tests)
    return audit(folder / "golden", mutants, killed, folder / "tests", folder / "package")


# ---- this repository


def test_every_clause_of_this_repository_is_proven_if_every_mutant_is_killed(refmoe: Refmoe, golden: Path) -> None:
    """Whether they are, golden/matrix.json says."""
    write_matrix(golden / MATRIX_FILE, all_killed(golden))
    status, out, _ = refmoe("suite", "audit", "--golden", golden, "--tests", TESTS, "--json")
    values = json.loads(out)
    assert values["problems"] == []
    assert status == 0
    assert (values["mutants"], values["killed"]) == (138, 136)
    forward = values["counts"]["forward pass"]
    assert forward["stated"] == 42
    assert forward["neither"] == 0
    assert forward["with a killed mutant"] >= 36
    assert forward["named by a test"] == 42


def test_every_clause_is_named_by_a_test_even_if_no_mutant_were_killed(golden: Path) -> None:
    """More than the rule asks for: nothing rests on the verifier and its mutants alone."""
    assert [row.clause for row in audit(golden, MUTANTS, set(), TESTS).gaps] == []


@pytest.mark.skipif(
    not MATRIX.exists(), reason="golden/matrix.json is not there yet: `refmoe mutants matrix --golden golden` writes it"
)
def test_the_audit_of_this_repository(refmoe: Refmoe) -> None:
    """With the matrix as it was computed: after a change of the catalogue, what is new in it is not recorded yet."""
    matrix = read_matrix(MATRIX)
    status, out, _ = refmoe("suite", "audit", "--golden", GOLDEN, "--tests", TESTS, "--json")
    values: dict[str, Any] = json.loads(out)
    if any(part.startswith(sources.CATALOGUE) for part in values["changed"]):
        known = {*summarise(matrix, [folder.name for folder in find_cases(GOLDEN)]).problems}
        assert {*values["problems"]} <= known
        return
    assert values["problems"] == []
    assert status == 0


# ---- what is reported


def test_a_clause_without_a_test_and_without_a_mutant_is_reported(tmp_path: Path) -> None:
    """Sabotage: a clause is added and nobody speaks of it; a case that names it proves nothing."""
    (case,) = find_cases(golden_folder(tmp_path / "golden"))
    path = case / "case.toml"
    path.write_text(path.read_text().replace("clauses = []", 'clauses = ["MADE-2"]'))
    (tmp_path / "tests" / "test_step.py").write_text('def test_step():\n    """MADE-1."""\n')
    found = audit(tmp_path / "golden", {}, set(), tmp_path / "tests", tmp_path / "package")
    assert [(row.clause, row.cases, row.gaps) for row in found.gaps] == [
        ("MADE-2", ("tiny",), ("no test names it, and no mutant breaks it",))
    ]
    assert found.rows[0].tests == ("tests/test_step.py::test_step",)
    assert found.rows[0].text == "The first, on two lines."


def test_only_a_killed_mutant_proves_its_clause(tmp_path: Path) -> None:
    """Sabotage: the mutant lives."""
    killed = audited(tmp_path, breaking("MADE-1", "MADE-2"), {"a-bug"})
    assert killed.gaps == ()
    assert killed.rows[0].killed == ("a-bug",)
    (tmp_path / "golden" / "vectors").unlink()
    alive = audited(tmp_path, breaking("MADE-1", "MADE-2"), set())
    assert [row.gaps for row in alive.rows] == [("no test names it, and no mutant of it is killed",)] * 2


def test_what_names_a_clause_that_nobody_states_is_reported(tmp_path: Path) -> None:
    """Sabotage: a mutant and a test of a clause that is gone. A name of another family is no clause: SHA-256."""
    tests = 'def test_step():\n    """MADE-1 and MADE-9, by SHA-256."""\n'
    found = audited(tmp_path, breaking("MADE-2", "MADE-8", "GONE-1"), {"a-bug"}, tests)
    assert found.strays == ("MADE-8: mutant a-bug", "GONE-1: mutant a-bug", "MADE-9: tests/test_step.py::test_step")


def test_a_clause_that_is_said_again_is_one_clause(tmp_path: Path) -> None:
    (tmp_path / "package" / "text" / "again.py").write_text('"""MADE-2  The second, elsewhere."""\n')
    found = audited(tmp_path, {}, set())
    assert [(row.clause, row.code) for row in found.rows] == [
        ("MADE-1", "spec/step.py:2 step"), ("MADE-2", "spec/step.py:2 step, text/again.py:1 (module)"),
    ]  # fmt: skip
    assert all(row.forward_pass for row in found.rows)


def test_a_living_mutant_fails_the_audit(refmoe: Refmoe, golden: Path) -> None:
    """Sabotage, in the matrix: of the forward pass, and of the tokenizer."""
    matrix = all_killed(golden)
    for policy in POLICIES:
        del matrix.kills["attn-gqa-tile"][policy]
    del matrix.outside["tok-double-bos"]
    write_matrix(golden / MATRIX_FILE, matrix)
    status, out, _ = refmoe("suite", "audit", "--golden", golden, "--tests", TESTS)
    assert status == 1
    lines = out.splitlines()
    assert "FAIL  mutant attn-gqa-tile lives in float32, bfloat16, float16: no case kills it" in lines
    assert "FAIL  mutant tok-double-bos lives: it gets every vector right" in lines
    assert "mutants: 134 of 138 killed, 2 equivalent" in lines


def test_an_audit_without_tests_or_matrix_is_refused(refmoe: Refmoe, golden: Path, tmp_path: Path) -> None:
    status, _, err = refmoe("suite", "audit", "--golden", golden, "--tests", tmp_path / "tests")
    assert (status, err) == (
        2,
        f"refmoe: {golden / MATRIX_FILE}: no such file; `refmoe mutants matrix --golden {golden}` writes it\n",
    )
    write_matrix(golden / MATRIX_FILE, all_killed(golden))
    status, _, err = refmoe("suite", "audit", "--golden", golden, "--tests", tmp_path / "none")
    assert (status, err) == (2, f"refmoe: {tmp_path / 'none'}: no such folder, but that of the tests was expected\n")
    status, out, _ = refmoe("suite", "audit", "--golden", golden, "--tests", tmp_path / "tests")
    assert status == 1
    assert "no test names it, and no mutant breaks it" in out
    (tmp_path / "tests" / "test_broken.py").write_text("def test_(:\n")
    status, _, err = refmoe("suite", "audit", "--golden", golden, "--tests", tmp_path / "tests")
    assert status == 2
    assert "test_broken.py: is no Python file that can be read" in err


# ---- who names what


def test_a_test_names_what_stands_in_its_own_source(tmp_path: Path) -> None:
    """Not what stands in a table beside it, in a function that is no test, or in a file that has none."""
    (tmp_path / "tests" / "test_some.py").write_text('''"""MADE-1."""
TABLE = ["MADE-2"]
@pytest.mark.parametrize("x", [1])  # MADE-3
def test_one(x):
    """MADE-4 to MADE-6."""
    assert x  # MADE-7
def helper():
    """MADE-8."""
class TestMany:
    """MADE-9."""
    def test_two(self):
        """MADE-1."""
''')
    (tmp_path / "tests" / "test_none.py").write_text('"""MADE-10."""\n')
    (tmp_path / "tests" / "samples.py").write_text('def test_like():\n    """MADE-11."""\n')
    name = "tests/test_some.py"
    one = [f"{name}::test_one"]
    assert named_in(tmp_path / "tests") == {
        "MADE-1": [name, f"{name}::test_two"], "MADE-3": one, "MADE-4": one, "MADE-5": one, "MADE-6": one,
        "MADE-7": one, "MADE-9": [f"{name}::TestMany"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MADE-1", {"MADE-1"}),
        ("MADE-9 to MADE-11", {"MADE-9", "MADE-10", "MADE-11"}),
        ("MADE-1 to OTHER-2", {"MADE-1", "OTHER-2"}),
        ("MADE-UP-3, MADE-12", {"MADE-UP-3", "MADE-12"}),
        ("made-1, MADE-, MADE-1-2, xMADE-3", set()),
    ],
)
def test_ids(text: str, expected: set[str]) -> None:
    assert ids_in(text) == expected


def test_a_statement_begins_a_line_and_goes_on_indented() -> None:
    text = "Title.\n\nMADE-1  One\n  two.\nMADE-2  Three.\nNot MADE-3  this.\nMADE-4 nor this.\nMADE-5  Last.\n"
    assert [*clauses_of(text)] == [("MADE-1", "One two."), ("MADE-2", "Three."), ("MADE-5", "Last.")]
