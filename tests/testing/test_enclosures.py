# SPDX-License-Identifier: Apache-2.0
"""Expected values from mathematics: all orders of a sum, exact integers, and the verifier's own check of a trace."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refmoe
import refmoe.testing as assertions
from refmoe.suite import read_case
from refmoe.testing import screening
from refmoe.testing.activation import judge_swiglu
from refmoe.testing.judgement import Judgement
from refmoe.testing.mixture import judge_combine
from refmoe.testing.norm import judge_rms_norm
from refmoe.testing.products import judge_grouped_linear, judge_linear
from refmoe.testing.routing import judge_router
from refmoe.verifier import tally
from tests.testing import kernels
from tests.testing.kernels import drawn

DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("name", DTYPES)
def test_every_order_of_a_sum_is_legal(name: str) -> None:
    """Each order of five products, and both ways to combine the halves, with a rounding to float32 after each step."""
    rng = np.random.default_rng(7)
    x, w = drawn(rng, 4, 5, name=name, scale=2.0 ** np.arange(-9, 6, 3)), drawn(rng, 6, 5, name=name)
    terms = (kernels.wide(x)[:, None] * kernels.wide(w)).astype(np.float32)
    results = set()
    for order in permutations(range(5)):
        a, b, c, d, e = (terms[..., i] for i in order)
        for found in ((((a + b) + c) + d) + e, (a + b) + ((c + d) + e), (a + (b + c)) + (d + e)):
            results.add(found.tobytes())
            assertions.assert_linear(found.astype(x.dtype), x, w)
    assert len(results) > 3


def test_the_interval_holds_the_exact_value() -> None:
    rng = np.random.default_rng(8)
    x, w = drawn(rng, 4, 33), drawn(rng, 5, 33)
    found = kernels.linear(x, w)
    worst = assertions.assert_linear(found, x, w).worst
    assert worst is not None
    row, column = worst.where
    exact = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x[row], w[column], strict=True))
    assert Fraction(worst.low) <= exact <= Fraction(worst.high)
    assert abs(float(exact) - worst.expected) <= 2**-45 * abs(worst.expected)


@pytest.mark.parametrize("name", DTYPES)
def test_no_integer_beside_the_exact_one_is_legal(name: str) -> None:
    """Sums of small integers are exact in any order, so an integer beside the result is impossible."""
    rng = np.random.default_rng(9)
    x, w = (rng.integers(-2, 3, shape).astype(kernels.dtype(name)) for shape in ((6, 12), (5, 12)))
    exact = x.astype(np.int64) @ w.astype(np.int64).T
    found = exact.astype(x.dtype)
    assertions.assert_linear(found, x, w)
    outside = np.array(found)
    row, column = np.argwhere(exact)[0]
    outside[row, column] += 1
    judged = judge_linear(outside, x, w, explain=False)
    assert judged.verdict == "fail"
    assert judged.worst is not None
    assert judged.worst.where == (row, column)


def expected_checks() -> tuple[Any, Any, dict[str, Any], list[Any]]:
    tokens = np.random.default_rng(1).integers(0, 97, 40).tolist()
    model = refmoe.load("walking-skeleton")
    trace = model.run(tokens, dtype="float32")
    report = refmoe.verify(trace, model, tokens, policy="float32")
    taps = {check.tap: trace["prefill", check.tap] for check in report.checks}
    layer = read_case(Path(__file__).parents[2] / "golden" / "walking-skeleton").checkpoint().parameters.layers[0]
    return layer, {check.tap: check for check in report.checks}, taps, tokens


def test_the_judgement_is_that_of_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same worst element, share of its interval, deviations, size and lean, from the same arrays in full."""
    monkeypatch.setattr(screening, "MANY", 1 << 62)
    # the verifier computes its whole spread for all values, not only where errors are large
    for room, name, at in ((tally, "FEW", 1 << 62), (tally, "CALM", -np.inf)):
        monkeypatch.setattr(room, name, at)
    layer, checks, taps, _ = expected_checks()
    of = {name.removeprefix("layers.0."): array for name, array in taps.items() if name.startswith("layers.0.")}
    ids, experts = of["router.experts"], layer.experts
    w1, w2, w3 = (np.stack([getattr(each, name).read() for each in experts]) for name in ("w1", "w2", "w3"))
    rows = np.repeat(of["moe_norm"], ids.shape[1], 0)
    slots = {name: array.reshape(-1, array.shape[-1]) for name, array in of.items() if name.startswith("expert.")}
    declared: dict[str, Any] = {"policy": "float32"}
    judged: dict[str, Judgement] = {
        "expert.gate": judge_grouped_linear(slots["expert.gate"], rows, w1, ids=ids.reshape(-1), **declared),
        "expert.up": judge_grouped_linear(slots["expert.up"], rows, w3, ids=ids.reshape(-1), **declared),
        "expert.hidden": judge_swiglu(slots["expert.hidden"], slots["expert.gate"], slots["expert.up"], **declared),
        "expert.output": judge_grouped_linear(
            slots["expert.output"], slots["expert.hidden"], w2, ids=ids.reshape(-1), **declared
        ),
        "moe.output": judge_combine(of["moe.output"], of["expert.output"], ids, of["router.weights"], **declared),
        "moe_norm": judge_rms_norm(of["moe_norm"], of["attention_residual"], layer.moe_norm.read(), 1e-5, **declared)[
            -1
        ],
        "router.weights": judge_router(ids, of["router.weights"], of["router.logits"], **declared)[-1],
        "router.logits": judge_linear(of["router.logits"], of["moe_norm"], layer.router.read(), **declared),
    }
    for step, mine in judged.items():
        check = checks[f"layers.0.{step}"]
        theirs = (check.worst_error, check.excess, check.rms, check.truncation)
        assert (mine.headroom, mine.deviations, mine.size, mine.lean) == pytest.approx(theirs, rel=1e-12), step
        assert mine.values == check.values, step
