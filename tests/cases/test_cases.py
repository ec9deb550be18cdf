# SPDX-License-Identifier: Apache-2.0
"""The golden cases are what they say: their conditions hold, their clauses exist, nothing is left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.native.ops import NativeOps
from refmoe.bugs.catalogue import MUTANTS
from refmoe.spec.model import Model
from refmoe.suite import CASE_FILE, PRODUCTION, Case, compute, find_cases, find_full_size_cases, read_case
from refmoe.suite.conditions import CONDITIONS, NOT_OF_A_CASE, golden_arrays, holding, mistakes, render
from refmoe.suite.conditions.__main__ import main
from refmoe.traces.script import Call, execute
from refmoe.traces.trace import Recorder
from tests.cases.order_free import OrderedOps, ProvingOps, lowest_bits

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "golden"
CASES = {folder.name: read_case(folder) for folder in find_cases(GOLDEN)}
PRODUCTION_CASES = {folder.name: read_case(folder) for folder in find_cases(GOLDEN, (PRODUCTION,))}
ALL = CASES | PRODUCTION_CASES
DYADIC = [case for case in CASES.values() if "DYADIC" in case.conditions]
each_case = pytest.mark.parametrize("case", ALL.values(), ids=ALL)
each_dyadic = pytest.mark.parametrize("case", DYADIC, ids=lambda case: case.name)


@cache
def arrays_of(name: str) -> Mapping[str, np.ndarray[Any, Any]]:
    return golden_arrays(ALL[name])


def spec_clauses() -> set[str]:
    text = "".join(path.read_text() for path in (REPOSITORY / "refmoe" / "spec").glob("*.py"))
    return set(re.findall(r"^ +([A-Z]+-\d+)  ", text, re.MULTILINE))


# --- what a case says -----------------------------------------------------------------------------------------------


def test_equal_files_in_two_working_folders_are_two_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CASES["top-1"].folder / CASE_FILE).read_bytes()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CASE_FILE).write_bytes(text)
        monkeypatch.chdir(tmp_path / name)
        assert read_case(Path(".")).name == name


@each_case
def test_exactly_the_declared_conditions_hold(case: Case) -> None:
    assert mistakes(case) == []


@each_case
def test_a_case_names_clauses_of_the_spec_and_bugs_by_id(case: Case) -> None:
    assert case.why
    assert case.clauses
    assert case.bugs
    assert set(case.clauses) <= spec_clauses()
    for ids in (case.clauses, case.bugs, case.conditions):
        assert len(set(ids)) == len(ids)
    for bug in case.bugs:
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)+", bug), bug


def test_every_clause_of_the_spec_has_a_case_aimed_at_it() -> None:
    assert len(spec_clauses()) > 35
    refused = {"INPUT-1"}  # an input that breaks it is refused, so no case can show it
    assert spec_clauses() - refused == {clause for case in CASES.values() for clause in case.clauses}


def test_every_condition_has_a_case() -> None:
    """No empty column, and none that is there only beside every other."""
    declared = [name for case in CASES.values() for name in case.conditions]
    assert set(declared) == CONDITIONS.keys()
    assert not NOT_OF_A_CASE.keys() & {need for each in CONDITIONS.values() for need in each.needs}


def test_the_table_is_current() -> None:
    assert (GOLDEN / "CASES.md").read_text(encoding="utf-8") == render([*ALL.values()])


def test_most_cases_are_of_a_shape_that_engines_take() -> None:
    """head_dim = dim / heads, as several engines insist; theta not what they fall back to."""
    for name, most in (("HEADDIM", False), ("THETA", True)):
        assert sum((name in case.conditions) == most for case in CASES.values()) > 0.75 * len(CASES)


def test_the_suite_is_under_20_mb() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 20e6


@pytest.mark.parametrize("case", [*ALL.values(), *map(read_case, find_full_size_cases(GOLDEN))], ids=lambda x: x.name)
def test_no_position_is_beyond_the_context_that_the_case_declares(case: Case) -> None:
    """An engine may size its table of angles, and its cache, by max_position_embeddings."""
    assert max(position for run in case.runs() for position in run.positions) < case.config.context


# --- the cases for production kernels -------------------------------------------------------------------------------

EXCEPTIONS = {
    "production-tail": "hidden_dim is divided by no tile",
    "production-positions-decoded": "2048 tokens",
    "production-positions-4096-decoded": "4096 tokens",
    "production-positions-32768-decoded": "32768 tokens",
}
"""The cases whose rows are no multiples of a block of 256, each with the reason."""


def test_a_production_case_has_what_its_kernels_take() -> None:
    """vLLM on a CPU takes head_dim 32, 64, ...; GGUF's block formats rows of 256; grouped products strides of 16 B."""
    for name, case in PRODUCTION_CASES.items():
        config = case.config
        assert config.head_dim in (32, 64, 80, 128), name
        assert name in EXCEPTIONS or (config.dim % 256, config.hidden_dim % 256) == (0, 0), name
        assert (config.heads * config.head_dim) % (64 if name in EXCEPTIONS else 256) == 0, name
        for columns in (config.dim, config.hidden_dim):
            assert columns % 8 == 0 or name == "production-tail", name
        assert max(position for run in case.runs() for position in run.positions) + 64 >= config.context, name
    values = {
        field: {getattr(case.config, field) for case in PRODUCTION_CASES.values()}
        for field in ("head_dim", "experts", "vocab")
    }
    assert {32, 64, 80, 128} <= values["head_dim"]
    assert {8, 128} <= values["experts"]
    assert {vocab % 64 == 0 for vocab in values["vocab"]} == {True, False}


def test_the_production_cases_have_the_conditions_that_a_bug_needs() -> None:
    declared = {name for case in PRODUCTION_CASES.values() for name in case.conditions}
    needed = {need for each in MUTANTS.values() for need in each.needs} & CONDITIONS.keys()
    assert needed - declared == set()
    assert {"CHUNK>W", "EMPTY", "SCORE-UNDERFLOW", "ROUTER-UNDERFLOW", "SEQMIX", "PACKED", "TOP-ALL"} <= declared


def test_the_production_cases_are_under_3_mb() -> None:
    sizes = [path.stat().st_size for case in PRODUCTION_CASES.values() for path in case.folder.iterdir()]
    assert sum(sizes) < 3e6


# --- conditions can fail --------------------------------------------------------------------------------------------

CONSTANT_GAINS = ({"parameter": "*norm", "value": 1.0},)
EQUAL_EXPERTS = ({"parameter": "layers.*.experts.*", "value": 1.0},)
ROUNDED = ({"parameter": "layers.*.experts.*.w2", "value": 0.0},)
NEVER_HOLDS: dict[str, dict[str, Any]] = {
    "T>1": {"calls": (Call("prefill", 0, (1,)), Call("decode", 0, (2,)))},
    "GAINS": {"edits": CONSTANT_GAINS},
    "LOAD": {"edits": EQUAL_EXPERTS},
    "LOWPREC": {"edits": ROUNDED},
    "THETA": {"theta": 1e6},
}
"""Conditions of nearly every case, and a change of `four-layers` that takes each away."""


@pytest.mark.parametrize("name", NEVER_HOLDS)
def test_a_condition_of_nearly_every_case_can_fail(name: str) -> None:
    changes = dict(NEVER_HOLDS[name])
    case = CASES["four-layers"]
    if "theta" in changes:
        changes["config"] = replace(case.config, rope_theta=changes.pop("theta"))
    changed = replace(case, **changes)
    assert name in holding(case, arrays_of("four-layers"))
    assert name not in holding(changed, compute(changed))


def test_a_window_is_crossed_by_the_first_token_that_it_loses() -> None:
    """Three tokens and a window of four: one more fills it, the next is the first to hide one."""
    case = CASES["window-decode"]
    found = []
    for steps in (1, 2):
        short = replace(case, calls=(case.calls[0], Call("decode", 0, (4, 18)[:steps])))
        found.append({"SWA", "DECODE-ACROSS-W"} & set(holding(short, compute(short))))
    assert found == [set(), {"SWA", "DECODE-ACROSS-W"}]


def test_every_other_condition_fails_in_some_case() -> None:
    always = {name for name in CONDITIONS if all(name in case.conditions for case in CASES.values())}
    assert always <= NEVER_HOLDS.keys()


def test_a_condition_that_is_wrong_or_left_out_is_named() -> None:
    case = CASES["packed"]
    spoilt = replace(case, conditions=("CUTS", *case.conditions[1:]))
    assert mistakes(spoilt) == ["CUTS is declared but does not hold", "T>1 holds but is not declared"]


def test_the_command_refuses_a_case_that_declares_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    text = (CASES["packed"].folder / "case.toml").read_text()
    (folder / "case.toml").write_text(text.replace('"PACKED"', '"PACKED", "CUTS"'))
    monkeypatch.setattr("sys.argv", ["conditions", "--golden", str(tmp_path), "--write"])
    with pytest.raises(SystemExit, match="packed: CUTS is declared but does not hold"):
        main()
    assert not (tmp_path / "CASES.md").exists()
    (folder / "case.toml").write_text(text)
    main()
    assert "`packed`" in (tmp_path / "CASES.md").read_text()


# --- what single cases promise --------------------------------------------------------------------------------------


def test_one_call_pieces_and_single_steps_give_the_same_bits() -> None:
    """MODEL-4 in exact arithmetic: rows 0, 1 and 2 of the case hold the same numbers for the same token."""
    case, arrays = CASES["one-shot-chunked-stepwise"], arrays_of("one-shot-chunked-stepwise")
    taps = [key.removeprefix("prefill.row0/") for key in arrays if key.startswith("prefill.row0/")]
    for tap in taps:
        if tap.endswith(("scores", "probs")):
            continue  # their last axis is as long as the cache of the call
        rows = [
            np.concatenate([arrays[f"{run.run}/{tap}"] for run in case.runs() if run.sequence == row])
            for row in range(3)
        ]
        assert rows[0].tobytes() == rows[1].tobytes() == rows[2].tobytes(), tap


def test_a_row_of_a_batch_is_the_row_alone() -> None:
    case, arrays = CASES["batch-ragged"], arrays_of("batch-ragged")
    alone = replace(case, calls=tuple(call._replace(sequence=0) for call in case.calls if call.sequence == 1))
    for key, values in compute(alone).items():
        run, _, tap = key.partition("/")
        assert np.array_equal(values, arrays[f"{run}.row1/{tap}"]), key


def test_one_pair_goes_to_experts_1_and_3_alone() -> None:
    for key, chosen in arrays_of("one-pair").items():
        if key.endswith("router.experts"):
            assert (np.sort(chosen) == [1, 3]).all()


# --- dyadic cases ---------------------------------------------------------------------------------------------------


def native(case: Case, kind: Any, *arguments: Any) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    recorder = Recorder()
    ops = kind(*arguments, recorder)
    execute(ops, Model(case.config, case.checkpoint().parameters), case.runs(), recorder)
    return ops, recorder.arrays


def equal(found: Any, golden: Any) -> bool:
    """Every bit but the sign of a zero, which the order of a sum decides."""
    assert found.keys() == golden.keys()
    return all(np.array_equal(np.asarray(found[key], golden[key].dtype), golden[key]) for key in golden)


def test_there_are_dyadic_cases_for_one_two_and_four_experts() -> None:
    assert {case.config.experts_per_token for case in DYADIC} == {1, 2, 4}


@each_dyadic
def test_no_sum_of_a_dyadic_case_rounds_in_float32_in_any_order(case: Case) -> None:
    """A proof for each sum, not a sample of orders."""
    ops, found = native(case, ProvingOps)
    assert sum(ops.sums) > 5000
    assert equal(found, arrays_of(case.name))


@each_dyadic
@pytest.mark.parametrize("seed", range(3))
def test_a_dyadic_case_in_float32_is_the_golden_in_every_bit(case: Case, seed: int) -> None:
    golden = arrays_of(case.name)
    assert equal(native(case, OrderedOps, seed)[1], golden)
    assert equal(native(case, NativeOps, np.float32)[1], golden)


@each_dyadic
def test_a_dyadic_case_has_equal_weights_and_shared_attention(case: Case) -> None:
    """It is not exact for being trivial: some probabilities are fractions, and tokens go to different experts."""
    arrays = arrays_of(case.name)
    weights = {w for key, array in arrays.items() if key.endswith("router.weights") for w in array.ravel()}
    assert weights == {1 / case.config.experts_per_token}
    assert any(((x > 0) & (x < 1)).any() for key, x in arrays.items() if key.endswith("attention.probs"))
    for i in range(case.config.layers):
        chosen = [np.sort(x) for key, x in arrays.items() if key.endswith(f"layers.{i}.router.experts")]
        assert len(np.unique(np.concatenate(chosen), axis=0)) > 1


def test_an_ordinary_case_is_not_exact_in_float32() -> None:
    """The proof and the comparison can fail."""
    case = CASES["top-1"]
    with pytest.raises(AssertionError):
        native(case, ProvingOps)
    assert not equal(native(case, OrderedOps, 1)[1], arrays_of("top-1"))


def test_the_lowest_bit_of_a_number() -> None:
    values = np.array([1.0, -6.0, 0.75, 2.0**-1074, 3 * 2.0**40, 0.0])
    assert lowest_bits(values).tolist() == [1, 2, 0.25, 2.0**-1074, 2.0**40, np.inf]
