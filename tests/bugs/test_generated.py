# SPDX-License-Identifier: Apache-2.0
"""Faults drawn at random and patched into transformers get the right structure in words, with the right rows, or none.

A few seeds only. `python -m bench.faults` draws as many as one likes, and holds them against the whole catalogue.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from refmoe.profiles.load import policy
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Header, Run
from refmoe.verifier.diagnosis.grammar.factors import several_rows
from refmoe.verifier.diagnosis.grammar.views import View
from refmoe.verifier.diagnosis.grammar.where import Rows, describe
from refmoe.verifier.findings import KNOWN_BUG, STRUCTURE, Explanation
from refmoe.verifier.verify import verify
from tests.bugs.generated import Change, Generated, Place
from tests.bugs.generated_effect import Given, holds_elsewhere
from tests.bugs.generated_engine import arrays_of
from tests.bugs.generated_judging import RIGHT, UNSEEN, WRONG, Outcome, by_grammar, judge
from tests.bugs.generated_wider import draw
from tests.bugs.judging import DTYPES, case_named, parameters_of, traced
from tests.bugs.judging import judged as judged_trace
from tests.bugs.test_diagnosis import edited
from tests.verifier.engines import Arrays, honest, model_named

pytestmark = pytest.mark.engines

SEEDS = (0, 2, 4, 9, 11, 13, 22, 26, 37, 48, 52, 47014)
"""One of most families: settings, orders, limits, constants, factors, sources, in some calls or in all."""


@cache
def outcome(seed: int, dtype: str) -> Outcome:
    return judge(draw(seed), dtype, explain=by_grammar)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_fault_is_seen_in_its_place_and_given_no_wrong_name(seed: int, dtype: str) -> None:
    found = outcome(seed, dtype)
    assert found.verdict != WRONG, found
    assert found.place or found.verdict == UNSEEN, found


def test_most_drawn_faults_are_named() -> None:
    found = [outcome(seed, "float32") for seed in SEEDS]
    assert sum(each.verdict == RIGHT for each in found) >= 0.8 * len(found), found
    assert all(each.limits for each in found if each.verdict == RIGHT), found


# ---- faults that engines had


def fault(case: str, step: str, kind: str, accepts: str, value: Any = None, calls: tuple[str, ...] = ()) -> Generated:
    """A fault of the generator that is not drawn: a setting."""
    return Generated(
        seed=-1, case=case, step=step, place="setting", kind=kind, axis="", detail="", accepts=(accepts,),
        change=lambda x, place: x, calls=calls, value=value,
    )  # fmt: skip


def changed(case: str, step: str, place: str, kind: str, accepts: str, change: Change) -> Generated:
    """A fault that changes an array of a step."""
    return Generated(
        seed=-1, case=case, step=step, place=place, kind=kind, axis="", detail="", accepts=(accepts,), change=change
    )


def frozen(x: Any, where: Place) -> Any:
    """The input of the first call with one token, in all calls with one token."""
    return where.memory.setdefault((where.layer, "first"), x.clone()) if len(x) == 1 else x


def divided(x: Any, where: Place) -> Any:
    """Each head divided by its root mean square. x: [T, heads, d]"""
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()


def overwritten(x: Any, where: Place) -> Any:
    """The newest key also in the slot before it, in decode. x: [S, heads, d]"""
    x = x.clone()
    if where.run.op == "decode":
        x[-2] = x[-1]
    return x


def lost(x: Any, where: Place) -> Any:
    """Slot 2 of the cache never written. x: [S, heads, d]"""
    x = x.clone()
    x[2:3] = 0
    return x


REPORTED = (
    fault("mini-8x7b", "moe.output", "first token's weights", "tokens all replaced by the first of the weights"),
    fault("every-expert", "moe.output", "expert twice", r"expert 2 times 2", value=2),
    fault("dims-distinct", "logits", "log-probabilities", "log-probabilities"),
    fault("walking-skeleton", "moe.output", "expert dropped", "expert 1 zeroed", value=1, calls=("prefill",)),
    fault("mini-8x7b", "attention_norm", "gain twice", "the gain applied twice"),
    changed("window-decode", "attention.q", "x", "frozen", "first call with as many tokens", frozen),
    changed("dims-distinct", "attention.k_rope", "x", "divided", "divided by its root mean square", divided),
    changed("window-decode", "attention.probs", "k", "overwritten", "the last also in the place before", overwritten),
    changed("walking-skeleton", "attention.context", "v", "lost", "cached position 2 zeroed", lost),
)


@pytest.mark.parametrize("reported", REPORTED, ids=lambda each: each.kind)
def test_a_fault_that_an_engine_had_is_named(reported: Generated) -> None:
    found = judge(reported, "float32", explain=by_grammar)
    assert (found.verdict, found.limits) == (RIGHT, True), found


def named_in(trace: Any, case: str, dtype: str) -> list[Explanation]:
    """The structures that the grammar finds."""
    right, report = case_named(case), judged_trace(trace, case, dtype)
    return [*by_grammar(trace, right.config, parameters_of(case), right.runs(), policy(dtype), report)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_come_back_in_another_order_are_named(dtype: str) -> None:
    """Gather and scatter undone in another order: a permutation of tokens after the experts."""
    order = [0, 3, 1, 2, 4, 5, 6, 7, 8]

    def exchanged(x: Any) -> Any:
        return x[order] if len(x) == len(order) else x

    (found,) = named_in(edited("skewed-weights", dtype, "moe.output", exchanged), "skewed-weights", dtype)
    assert found.name.startswith("moe.output: tokens permuted (1 holds 3, 2 holds 1, 3 holds 2)")
    assert found.where == "in prefill calls"


def test_rows_of_a_batch_that_are_exchanged_are_named() -> None:
    arrays = dict(honest("batch-ragged", "float32"))
    one, two = "decode1.row0/logits", "decode1.row1/logits"
    arrays[one], arrays[two] = arrays[two], arrays[one]
    (found,) = structures_of("batch-ragged", arrays)
    assert found.name == "logits: values taken from the other one of sequences 0 and 1"


def structures_of(name: str, arrays: Arrays) -> list[Explanation]:
    """The structures in a trace of transformers at float32."""
    model, used = model_named(name), policy("hf-float32")
    trace = held_trace(Header(model.runs, policy="hf-float32"), arrays)
    parameters = model.checkpoint.parameters
    report = verify(trace, name, model.config, parameters, model.runs, used)
    return [*by_grammar(trace, model.config, parameters, model.runs, used, report)]


# ---- the judge: a name in other words must hold for other tokens


@pytest.mark.parametrize(
    ("name", "where", "right"),
    [
        ("moe.output: slots all replaced by slot 0 of the weights that it reads", "", False),
        ("moe.output: expert 1 zeroed of the weights that it reads", "in prefill calls", True),
        ("moe.output: expert 1 zeroed of the weights that it reads", "", False),
        ("moe.output: expert 0 zeroed of the weights that it reads", "in prefill calls", False),
    ],
)
def test_a_name_in_other_words_must_hold_for_other_tokens(name: str, where: str, right: bool) -> None:
    dropped = next(each for each in REPORTED if each.kind == "expert dropped")
    model = model_named(dropped.case)
    given = Given(name, STRUCTURE, where)
    assert holds_elsewhere(model, given, "float32", lambda runs: arrays_of(dropped, "float32", runs), 1e-3) == right


@pytest.mark.parametrize(("name", "right"), [("expert-w1-w3-swapped", True), ("expert-gelu", False)])
def test_a_known_bug_is_held_against_other_tokens(name: str, right: bool) -> None:
    swapped = fault("walking-skeleton", "expert.hidden", "swapped", "never said")
    model = model_named(swapped.case)
    given = Given(name, KNOWN_BUG, "")
    assert holds_elsewhere(model, given, "float32", lambda runs: arrays_of(swapped, "float32", runs), 1e-3) == right


# ---- no name


@pytest.mark.parametrize(
    ("arrays", "several"),
    [
        ([[[1.0, 2.0]], [[2.0, 4.0]]], False),
        ([[[1.0, 2.0]], [[2.0, 1.0]]], True),
        ([[[1.0, 2.0], [0.0, 0.0]], [[np.inf, 1.0]]], False),
        ([[[1.0, 2.0]], [[1.0, 2.0, 3.0]]], True),  # calls of one head that see different numbers of positions
    ],
)
def test_rows_count_as_several_where_two_differ_in_more_than_size(arrays: Any, several: bool) -> None:
    pairs: Any = {("run", str(i)): (np.array(rows), None) for i, rows in enumerate(arrays)}
    unused: Any = None
    view = View(name="", dims=("H", "S"), pairs=pairs, base=unused, lift=unused)
    assert several_rows(unused, view) == several


@pytest.mark.parametrize("step", ["logits", "attention_norm", "moe.output"])
def test_a_single_row_that_may_be_anything_gets_no_name(step: str) -> None:
    """Numbers for each channel explain any single row."""
    arrays = dict(honest("window-decode", "float32"))
    key = f"decode2/{step}" if step == "logits" else f"decode2/layers.0.{step}"
    random = np.random.default_rng(5)
    if step == "logits":
        matrix: Any = model_named("window-decode").checkpoint.parameters.output
        output = np.asarray(matrix.read(), np.float64)
        arrays[key] = np.asarray(random.normal(size=(1, output.shape[1])) @ output.T, np.float32)
    else:
        arrays[key] = np.asarray(random.normal(size=arrays[key].shape), np.float32)
    assert structures_of("window-decode", arrays) == []


NOISY = ("attention.q", "attention.probs", "router.weights", "moe.output", "logits")


@pytest.mark.parametrize(("step", "dtype"), [(step, DTYPES[i % 3]) for i, step in enumerate(NOISY)])
def test_values_of_no_structure_get_no_name(step: str, dtype: str) -> None:
    random = np.random.default_rng(7)

    def noise(x: Any) -> Any:
        return np.abs(x) * random.uniform(0.5, 2.0, x.shape)

    assert named_in(edited("walking-skeleton", dtype, step, noise), "walking-skeleton", dtype) == []


@pytest.mark.parametrize("value", [1e300, -1e300, 1e38, 1e-300, 0.0, np.inf, np.nan])
@pytest.mark.parametrize("step", ["attention_norm", "attention.k", "attention.probs", "expert.gate", "moe.output"])
@pytest.mark.filterwarnings("error")
def test_no_value_of_a_stranger_raises_or_warns(step: str, value: float) -> None:
    def planted(x: Any) -> Any:
        y = x.astype(np.float64)
        y.reshape(-1)[::5] = value
        return y

    named_in(edited("dims-distinct", "float64", step, planted), "dims-distinct", "float64")


def test_an_honest_trace_has_nothing_to_explain() -> None:
    assert named_in(traced(None, "walking-skeleton", "float32"), "walking-skeleton", "float32") == []


# ---- where

RUNS = (Run("prefill", "prefill", 0, (1, 2, 3), (0, 1, 2), 0), Run("decode1", "decode", 0, (4,), (3,), 3))


def rows() -> Rows:
    """The rows of two calls and two layers: three tokens and one."""
    found = [(i, run, layer, t) for i, run in enumerate(RUNS) for layer in (0, 1) for t in range(len(run.tokens))]
    column = {
        "run": [i for i, *_ in found], "op": [run.op for _, run, *_ in found], "sequence": [0] * len(found),
        "length": [len(run.tokens) for _, run, *_ in found], "past": [run.past for _, run, *_ in found],
        "layer": [layer for *_, layer, _ in found], "token": [t for *_, t in found],
        "expert": [-1] * len(found), "slot": [0] * len(found),
    }  # fmt: skip
    return Rows(**{name: np.array(values) for name, values in column.items()}, names=[run.run for run in RUNS])


@pytest.mark.parametrize(
    ("acts", "words"),
    [
        (lambda op, layer, token: True, ""),
        (lambda op, layer, token: op == "decode", "in decode calls"),
        (lambda op, layer, token: layer == 1, "in layer 1"),
        (lambda op, layer, token: op == "prefill" and layer == 0, "in prefill calls, in layer 0"),
        (lambda op, layer, token: token == 1, "in token 1"),
        (lambda op, layer, token: op == "prefill" and token > 0, "not in the first token of a call"),
    ],
)
def test_rows_are_described_in_the_fewest_words(acts: Any, words: str) -> None:
    table = rows()
    acting = np.array([acts(*each) for each in zip(table.op, table.layer, table.token, strict=True)])
    found = describe(table, acting, ~acting)
    assert found is not None
    assert found.words == words
    assert (found.inside == acting).all()


def test_rows_without_a_common_description_have_none() -> None:
    table = rows()
    acting = np.arange(len(table.token)) % 3 == 0
    assert describe(table, acting, ~acting) is None
