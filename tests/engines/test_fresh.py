# SPDX-License-Identifier: Apache-2.0
"""Fresh cases: other weights and tokens, the same structure; an echo of the goldens fails them."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from refmoe.engines.results import read_results
from refmoe.suite import Case, compute, find_cases, read_case
from refmoe.suite.conditions import CONDITIONS
from refmoe.suite.conditions.observed import Observed
from refmoe.suite.fresh import fixed_tokens, fresh_case
from tests.command_line import Refmoe
from tests.engines.running import GOLDEN, HARNESSES, HONEST

ECHO = [HONEST[0], str(HARNESSES / "echo.py")]
ALL = [read_case(folder) for folder in find_cases(GOLDEN)]
OF_CALLS = [each for each in CONDITIONS.values() if each.group in ("calls", "shape", "window")]


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def tokens(case: Case) -> list[int]:
    return [*chain.from_iterable(run.tokens for run in case.runs())]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_structure_of_the_calls_stays(case: Case) -> None:
    """Equal tokens stay equal and different ones different; names that mean something stay."""
    fresh = fresh_case(case, 7)
    assert [run.run for run in fresh.runs()] == [run.run for run in case.runs()]
    pairs = {*zip(tokens(case), tokens(fresh), strict=True)}
    assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
    assert all(old == new for old, new in pairs if old in fixed_tokens(case))
    assert {0, case.config.vocab - 1} <= fixed_tokens(case)
    assert fresh.config == case.config
    assert fresh.digest != case.digest
    assert fresh.seed != case.seed


def test_conditions_of_calls_and_shapes_hold_as_before() -> None:
    """Conditions that look at a value of a tap are left out: the arrays are not there."""
    told = 0
    for case in ALL:
        for each in OF_CALLS:
            try:
                before = each.holds(Observed(case, {}))
            except KeyError:
                continue  # it looks at values
            assert each.holds(Observed(fresh_case(case, 3), {})) == before, (case.name, each.name)
            told += before
    assert told > 100


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    case = read_case(GOLDEN / "top-1")
    first, again, other = (compute(fresh_case(case, seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["prefill/logits"], other["prefill/logits"])
    assert tokens(fresh_case(case, 1)) != tokens(fresh_case(case, 2))


def test_an_edited_row_of_the_embedding_keeps_its_token() -> None:
    assert 6 in fixed_tokens(read_case(GOLDEN / "zero-row"))


CASES = ("conform", "--no-diagnose", "--case", "top-1", "--case", "zero-row", "--case", "dyadic")


def test_an_echo_is_told_from_an_engine_that_computes(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "echo.json"
    assert refmoe(*CASES, "--out", out, "--", *ECHO)[0] == 0
    results = read_results(out)
    assert [note.partition(":")[0] for note in results.notes] == ["float64", "float32", "bfloat16"]
    assert all("--fresh" in note and "2 of 3" in note for note in results.notes), "in dyadic, nothing is rounded"
    assert results.fresh is None
    assert refmoe(*CASES, "--out", out, "--", *HONEST)[0] == 0
    assert not read_results(out).notes


def test_an_echo_fails_fresh_cases_and_an_engine_that_computes_does_not(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "fresh.json"
    one = (*CASES[:4], "--fresh", 20261128)
    assert refmoe(*one, "--out", out, "--", *ECHO)[0] == 1
    results = read_results(out)
    assert {each.verdict for each in results.outcomes} == {"not conformant"}
    assert results.fresh == 20261128
    assert not results.notes
    status, said, _ = refmoe(*one, "--json", "--out", out, "--", *HONEST)
    assert status == 0, said
    assert json.loads(said)["fresh"] == json.loads(said)["results"]["fresh"] == 20261128
    assert "20261128" in refmoe("scoreboard", out)[1]


def test_a_fresh_trace_does_not_pass_for_one_of_the_golden_case(refmoe: Refmoe, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert refmoe(*CASES[:4], "--dtype", "float32", "--fresh", 1, "--keep", kept, "--", *HONEST)[0] == 0
    (trace,) = kept.iterdir()
    assert refmoe("verify", trace)[0] == 2
    assert refmoe("verify", trace, "--case", "top-1")[0] == 2


def test_a_fresh_run_of_an_adapter(refmoe: Refmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ".")
    arguments = ("--adapter", "tests.engines.harnesses.loud", "--dtype", "float32", "--fresh", 5)
    status, said, _ = refmoe("conform", "--case", "top-1", *arguments)
    assert status == 0
    assert "seed 5" in said


@pytest.mark.parametrize("seed", ["-1", "1_0", "²", "x"])
def test_a_seed_is_a_number_in_digits(refmoe: Refmoe, seed: str) -> None:
    assert refmoe("conform", "--fresh", seed, "--", *HONEST)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_an_engine_that_computes_conforms_in_every_fresh_case(refmoe: Refmoe, seed: int) -> None:
    status, said, _ = refmoe("conform", "--no-diagnose", "--fresh", seed, "--", *HONEST)
    assert status == 0, said
