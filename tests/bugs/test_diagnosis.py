# SPDX-License-Identifier: Apache-2.0
"""Diagnosis beyond single bugs: pairs, structures, NaN, and no name if nothing fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.changed_weights import mapped, with_layers
from refmoe.bugs.run_engine import run
from refmoe.bugs.sharded_mutant import on_ranks
from refmoe.profiles.load import policy
from refmoe.steps.sharded.layout import Layout
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis import explained
from refmoe.verifier.diagnosis.grammar.laboratory import LINEAR
from refmoe.verifier.diagnosis.known import Pair
from refmoe.verifier.findings import ARITHMETIC, KNOWN_BUG, NOT_CONFORMANT, STRUCTURE, TWO_BUGS, Explanation
from tests.bugs.judging import DTYPES, case_named, diagnosed, judged, parameters_of, traced

Edit = Callable[[Any], Any]


def edited(name: str, dtype: str, step: str, edit: Edit) -> Trace:
    """An honest trace, each tap of one step changed. The change is rounded to the trace's dtype."""
    honest = traced(None, name, dtype)
    arrays = held(honest)
    for key, array in arrays.items():
        if key.endswith(step):
            arrays[key] = edit(array.astype(np.float64)).astype(array.dtype)
    return held_trace(honest.header, arrays)


def held(trace: Trace) -> dict[str, Any]:
    """The arrays of a trace in memory."""
    return {key: np.array(tensor.get()) for key, tensor in trace.tensors.items()}


def found_in(trace: Trace, name: str, dtype: str) -> tuple[Explanation, ...]:
    """The explanations in a report."""
    report = judged(trace, name, dtype)
    assert report.verdict == NOT_CONFORMANT
    explanations = explained(report, diagnosed(trace, name, dtype, report, MUTANTS.values())).explanations
    assert explanations is not None
    return explanations


def swapped(x: Any) -> Any:
    """Heads 0 and 2 exchanged."""
    return np.take(x, [2, 1, 0, *range(3, x.shape[1])], axis=1)


def doubled(x: Any) -> Any:
    """Odd channels hold their neighbours' values."""
    return np.repeat(x[..., ::2], 2, axis=-1)


STRUCTURES: dict[str, tuple[str, Edit, str, str]] = {
    "heads": ("attention.q", swapped, "heads 0 and 2 exchanged", "0 holds 2"),
    "channels": ("moe_norm", doubled, "channels taken from other channels", "1 holds 0"),
    "factor": ("attention.output", lambda x: x * 1.75, "times 1.75", "1.75 times"),
    "sign": ("expert.output", lambda x: -x, "times -1", "-1 times"),
    "root": ("attention.q", lambda x: x * np.sqrt(6), "times sqrt(head_dim)", "sqrt(head_dim)"),
    "shift": ("moe_norm", lambda x: np.roll(x, 1, axis=0), "tokens shifted by +1", "shifted by +1 in a circle"),
    "early": ("moe_norm", lambda x: np.roll(x, -1, axis=0), "tokens shifted by -1", "shifted by -1 in a circle"),
    "axes": ("attention.v", lambda x: np.swapaxes(x, 1, 2).reshape(x.shape), "transposed", "exchanged in memory"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_is_named(name: str, dtype: str) -> None:
    step, edit, words, detail = STRUCTURES[name]
    first, *_ = found_in(edited("dims-distinct", dtype, step, edit), "dims-distinct", dtype)
    assert (first.kind, first.explains) == (STRUCTURE, True)
    assert first.name.startswith(f"{step}: ")
    assert words in first.name
    assert detail in first.about


def loaded(name: str, dtype: str, change: Edit) -> Trace:
    """The trace of an engine whose layers are changed when they are loaded."""
    case = case_named(name)
    parameters = with_layers(parameters_of(name), change)
    return run(None, case.config, parameters, case.runs(), policy(dtype))


@pytest.mark.parametrize("matrices", [("w2",), ("w1", "w3", "w2")], ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_experts_are_named(matrices: tuple[str, ...], dtype: str) -> None:
    order = [2, 0, 1, 3, 4]

    def change(layer: Any) -> Any:
        taken = [{m: getattr(layer.experts[p], m) for m in matrices} for p in order]
        experts = tuple(replace(expert, **new) for expert, new in zip(layer.experts, taken, strict=True))
        return replace(layer, experts=experts)

    found = found_in(loaded("dims-distinct", dtype, change), "dims-distinct", dtype)
    steps = {step for step, matrix in LINEAR.items() if matrix in matrices}
    assert {each.name.partition(" (")[0] for each in found} == {
        f"{step}: experts with another's {LINEAR[step]}" for step in steps
    }
    for each in found:
        # an expert that no token chose cannot be seen
        listed = re.findall(r"\d has that of \d", each.about)
        assert {*listed} <= {"0 has that of 2", "1 has that of 0", "2 has that of 1"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_square_matrix_used_as_its_transpose_is_named(dtype: str) -> None:
    config = case_named("square").config
    assert config.heads * config.head_dim == config.dim

    def change(layer: Any) -> Any:
        return replace(layer, wo=mapped(layer.wo, np.transpose))

    first, *_ = found_in(loaded("square", dtype, change), "square", dtype)
    assert first.name == "attention.output: wo transposed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("attn-gqa-tile", "expert-w1-w3-swapped"),
        ("rope-sign-flipped", "router-double-softmax"),
        ("expert-gelu", "expert-weight-missing"),
    ],
)
def test_two_bugs_at_once_are_both_named(one: str, two: str, dtype: str) -> None:
    case = case_named("dims-distinct")
    pair: Any = Pair(MUTANTS[one], MUTANTS[two])
    object.__setattr__(pair, "id", "two")
    trace = run(pair, case.config, parameters_of(case.name), case.runs(), policy(dtype))
    first, *_ = found_in(trace, case.name, dtype)
    assert first.kind == TWO_BUGS
    assert set(first.name.split(" + ")) == {one, two}
    assert first.coefficient == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bug_of_a_sharded_run_is_named(dtype: str) -> None:
    bug = on_ranks(MUTANTS["tp-residual-counted-n-times"], Layout(3, 1))
    first, *_ = found_in(traced(bug, "dims-distinct", dtype), "dims-distinct", dtype)
    assert (first.kind, first.name) == (KNOWN_BUG, bug.id)


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_a_cache_in_a_dtype_that_nobody_declared_is_named(kept: str) -> None:
    case = case_named("walking-skeleton")
    low = run(None, case.config, parameters_of(case.name), case.runs(), policy(f"float32+cache={kept}"))
    found = found_in(held_trace(replace(low.header, policy="float32"), held(low)), case.name, "float32")
    assert {each.kind for each in found} == {ARITHMETIC}
    assert f"float32+cache={kept}" in {each.name for each in found}


def test_a_sigmoid_that_is_precise_in_absolute_terms_alone_is_named() -> None:
    """As in onnxruntime 1.32: a few units of the roundoff of 1, whatever the sigmoid's own size."""
    honest = traced(None, "walking-skeleton", "float32")
    arrays, generator = held(honest), np.random.default_rng(1)
    for key in [key for key in arrays if key.endswith("expert.gate")]:
        gate, up = (arrays[key.replace("gate", name)].astype(np.float64) for name in ("gate", "up"))
        sigmoid = 1 / (1 + np.exp(-gate)) + generator.uniform(-3, 3, gate.shape) * 2.0**-24
        arrays[key.replace("gate", "hidden")] = (gate * sigmoid * up).astype(np.float32)
    # what follows is right, given what it reads
    case = case_named("walking-skeleton")
    given = {key: array for key, array in arrays.items() if "expert.output" not in key and "moe" not in key}
    kept = {key: array for key, array in given.items() if "layers.0" in key and "residual" not in key}
    found = found_in(held_trace(honest.header, kept), case.name, "float32")
    assert [(each.kind, each.name) for each in found] == [(ARITHMETIC, "float32+sigmoid=absolute")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_nothing_fits_nothing_is_named(dtype: str) -> None:
    generator = np.random.default_rng(1)

    def noise(x: Any) -> Any:
        return x + generator.standard_normal(x.shape) * np.abs(x).mean()

    for step in ("attention.v", "router.logits", "expert.output", "residual"):
        assert found_in(edited("dims-distinct", dtype, step, noise), "dims-distinct", dtype) == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bug_that_makes_nan_is_named_by_where_they_are(dtype: str) -> None:
    bug, shown_by = "attn-fully-masked-row-nan", "batch-ragged"
    first, *_ = found_in(traced(bug, shown_by, dtype), shown_by, dtype)
    assert (first.kind, first.name) == (KNOWN_BUG, bug)
    # the same NaN elsewhere is not this bug
    elsewhere = edited(shown_by, dtype, "attention.probs", lambda x: np.where(np.arange(len(x)) == 0, np.nan, x.T).T)
    assert bug not in {each.name for each in found_in(elsewhere, shown_by, dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("window-decode", "window", None, "window ignored"),
        ("window-chunks", "window", None, "window ignored"),
        ("tiny-embedding", "norm_eps", 1e-8, "norm_eps 1e-08"),
        ("dims-distinct", "rope_theta", 5e5, "rope_theta 500000"),
        ("dims-distinct", "rope_theta", 2e5, "attention.k_rope: theta 200000"),
    ],
)
def test_another_setting_is_named(name: str, field: str, value: Any, words: str, dtype: str) -> None:
    """An ignored window, as in mlx-lm 0.32, is named. A value that is no common default is fitted."""
    case = case_named(name)
    trace = run(None, replace(case.config, **{field: value}), parameters_of(name), case.runs(), policy(dtype))
    found = found_in(trace, name, dtype)
    named = [each.name for each in found if each.kind in (KNOWN_BUG, STRUCTURE)]
    if dtype == "bfloat16" and value == 2e5:  # eight bits of the angles tell it to some permille
        step, fitted = named[0].rpartition(" ")[::2]
        assert (step, float(fitted)) == (words.rpartition(" ")[0], pytest.approx(value, rel=2**-8))
    else:
        assert named[:1] == [words]
