# SPDX-License-Identifier: Apache-2.0
"""The matrix of the cases for production kernels: each mutant runs until a case kills it, and no further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.suite import PRODUCTION, SMALL, Case, find_cases, read_case
from refmoe.suite.matrix import dependencies as sources
from refmoe.suite.matrix import search as module
from refmoe.suite.matrix.changes import losses, sample
from refmoe.suite.matrix.compute import compute
from refmoe.suite.matrix.file import MATRIX_FILE, MATRIX_FILES, Matrix, read_matrix
from refmoe.suite.matrix.outcomes import INERT, SPECIFICATION, Outcome, Work, runnable, whole
from refmoe.suite.matrix.search import SEARCHED, Search, affected_pairs, pairs_of, search, searched
from refmoe.suite.matrix.summary import summarise
from refmoe.verifier.findings import CONFORMANT
from tests.bugs.judging import GOLDEN
from tests.bugs.sample_matrix import PLACE, killed

NAMES = ("attn-swa-off-by-one", "emb-scale-sqrt-d", "rope-sign-flipped")
WINDOW, SCALE, SIGN = ((name, "float32") for name in NAMES)
CASES = {name: read_case(GOLDEN / name) for name in ("one-pair", "window-decode", "top-1")}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Nothing is run: the window shows one bug, every case another, none the third. The mutants and cases asked for."""
    found: list[tuple[str, str]] = []

    def judged(work: Sequence[Work], *_: Any) -> list[Outcome]:
        outcomes = []
        for each in work:
            outcomes.append(Outcome(SPECIFICATION, each.case.name, each.policy, CONFORMANT))
            for name in each.mutants:
                found.append((name, each.case.name))
                dies = name == NAMES[1] or (name == NAMES[0] and each.case.name == "window-decode")
                outcomes.append(
                    killed(name, each.case.name) if dies else Outcome(name, each.case.name, each.policy, INERT)
                )
        return outcomes

    monkeypatch.setattr(module, "compute", judged)
    return found


def test_a_mutant_runs_until_it_is_killed_and_the_likely_case_comes_first(asked: list[tuple[str, str]]) -> None:
    outcomes = search(Search((WINDOW, SCALE, SIGN), CASES))
    assert [case for name, case in asked if name == NAMES[0]] == ["window-decode"]  # it has the condition SWA
    assert len([case for name, case in asked if name == NAMES[1]]) == 1
    assert {case for name, case in asked if name == NAMES[2]} == {*CASES}
    assert {each.case for each in outcomes if each.mutant == SPECIFICATION} == {*CASES}


def test_the_case_that_killed_it_before_comes_first(asked: list[tuple[str, str]]) -> None:
    before = Matrix({}, {NAMES[1]: {"float32": {"window-decode": PLACE}}}, {}, {})
    search(Search((SCALE,), CASES, before))
    assert asked == [(NAMES[1], "window-decode")]


def test_a_revised_matrix_forgets_what_was_run_again_and_what_is_gone() -> None:
    recorded = {
        NAMES[0]: {"float32": {"window-decode": PLACE}},
        NAMES[1]: {"float32": {"one-pair": PLACE}},
        NAMES[2]: {"float32": {"gone": PLACE}},
    }
    before = Matrix({}, recorded, {}, {})
    found = searched(before, Search((SCALE,), CASES), [killed(NAMES[1], "top-1")], {"core": "x"})
    assert found.kills == {
        NAMES[1]: {"float32": {"top-1": PLACE}}, NAMES[0]: {"float32": {"window-decode": PLACE}},
    }  # fmt: skip
    assert found.sources == {"core": "x"}


def test_what_a_change_can_affect() -> None:
    kills = {name: {"float32": {"one-pair": PLACE}} for name in runnable()}
    kills[NAMES[0]] = {"float32": {"window-decode": PLACE}}
    del kills[NAMES[2]]
    matrix = Matrix({}, kills, {}, {})
    assert affected_pairs({"core"}, matrix) == pairs_of(runnable())
    assert affected_pairs({"cases/window-decode"}, matrix) == (WINDOW, SIGN)
    embedding = {name for name, _ in affected_pairs({"bugs/embedding"}, matrix)} - {NAMES[2]}
    assert embedding == {name for name in runnable() if MUTANTS[name].kind == "embedding"}


def test_what_nothing_can_show_is_not_searched() -> None:
    assert ("prec-fp16-ffn-overflow", "float16") not in pairs_of(runnable(), ("float16",))


# ---- the matrix of this repository


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {folder.name: read_case(folder) for folder in find_cases(GOLDEN, (PRODUCTION,))}


@pytest.fixture(scope="module")
def real() -> Matrix:
    return read_matrix(GOLDEN / MATRIX_FILES[PRODUCTION])


def test_the_matrix_is_current(real: Matrix) -> None:
    parts = sources.changed(real.sources, GOLDEN, PRODUCTION)
    assert not parts, f"matrix-production.json is older than {', '.join(sorted(parts))}: run refmoe mutants matrix"


def test_the_production_cases_kill_every_mutant_by_themselves(real: Matrix, cases: dict[str, Case]) -> None:
    small = read_matrix(GOLDEN / MATRIX_FILE)
    summary = summarise(replace(real, outside=small.outside), [*cases], SEARCHED)
    assert summary.problems == []
    assert summary.killed == {"float32": len(runnable())}


@pytest.mark.slow
def test_what_killed_a_mutant_kills_it_again(real: Matrix, cases: dict[str, Case]) -> None:
    outcomes = compute([each for each in sample(real, cases) if each.policy in SEARCHED], executor="processes:1")
    assert len(outcomes) > len(runnable())
    assert [str(loss) for loss in losses(real, outcomes, {})] == []
    assert not any(each.killed for each in outcomes if each.mutant == SPECIFICATION)


@pytest.mark.slow
def test_a_production_case_shows_the_bugs_that_it_lists(cases: dict[str, Case]) -> None:
    """In float32. The search stops at the first case that kills, so the matrix does not say it."""
    for case in cases.values():
        listed = [bug for bug in case.bugs if bug in runnable()]
        assert listed
        outcomes = compute(whole([case.folder], listed, SEARCHED), executor="processes:1")
        assert {each.mutant for each in outcomes if each.killed} == {*listed}, case.name


def test_the_families_have_matrices_of_their_own_cases() -> None:
    small, production = sources.digests(GOLDEN, SMALL), sources.digests(GOLDEN, PRODUCTION)
    names = [{name for name in found if name.startswith(sources.CASES)} for found in (small, production)]
    assert all(names)
    assert not names[0] & names[1]
    assert small["core"] == production["core"]
