# SPDX-License-Identifier: Apache-2.0
"""Sums that are cut off and not rounded: no legal one leaves the interval or is improbable, and faults are seen."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import accumulators
from bench import enclosures as bench
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.matrices import Matrix
from refmoe.arithmetic.enclosure.products import Accumulator, product
from refmoe.arithmetic.formats import FLOAT16, Format, nearest
from refmoe.arithmetic.tensor_core import E4M3, E5M2, TF32, TensorCore
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.products import judge_linear

NARROW = Format("five bits", 5, -126, 127)
"""An accumulator that loses much of a term, so that its errors reach far."""
SHORT = Format("two bits", 2, -6, 8)
"""Factors whose products it holds."""
CUT = "float32+truncates=true"
LONG = 14336
"""The terms of the longest sums of Mixtral 8x7B."""


def enclosed(x: Any, w: Any, inputs: Format, truncates: bool = True) -> Enclosure:
    how = Accumulator(format=NARROW, inputs=inputs, truncates=truncates)
    return product(Enclosure(x), Matrix(Enclosure(w)), how)


def core_of(inputs: Format, terms: int = 4, more: int = 0) -> TensorCore:
    """A core that keeps the bits of `NARROW`, and `more` while it adds."""
    kept = NARROW.precision - 1
    return TensorCore(inputs, aligned=kept + more, terms=terms, kept=kept)


# ---- hard


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_cut_sum_leaves_the_interval(data: Any) -> None:
    """Any order of any terms, subnormal factors included, in any number of parts that are added in the accumulator."""
    inputs = data.draw(st.sampled_from([SHORT, E4M3, E5M2]))
    core = core_of(inputs, data.draw(st.integers(4, 9)), data.draw(st.sampled_from([0, 1, 2, 20])))
    n = data.draw(st.integers(1, 14))
    powers = st.integers(inputs.exponent_min - inputs.precision + 1, min(inputs.exponent_max, 3))
    value = st.one_of(st.just(0.0), powers.map(lambda e: 2.0**e), st.floats(-8, 8, width=32))
    x, w = (
        nearest(np.reshape(data.draw(st.lists(value, min_size=2 * n, max_size=2 * n)), shape), inputs)
        for shape in ((2, n), (n, 2))
    )
    order = np.array(data.draw(st.permutations(range(n))))
    total = np.zeros((2, 2))
    for part in np.array_split(order, data.draw(st.integers(1, n))):
        total = nearest(total + core.run(x[:, part], w[part]), NARROW)
    legal = enclosed(x, w, inputs)
    for (i, j), found in np.ndenumerate(total):
        exact = sum((Fraction(a) * Fraction(b) for a, b in zip(x[i], w[:, j], strict=True)), Fraction())
        assert abs(Fraction(float(found)) - exact) <= Fraction(float(legal.r[i, j]))
    assert (legal.bias <= legal.r).all()


@pytest.mark.parametrize("terms", [4, 5, 6])
def test_every_order_of_six_terms_is_inside_and_the_worst_is_near(terms: int) -> None:
    """All 720 orders of hard rows: equal signs, one large term, terms that cancel."""
    rows = nearest(
        np.array([[1.5, 1, 1, 1, 1, 1], [12, 0.5, 0.5, 0.5, 0.75, 0.75], [4, -4, 1.5, -1, 0.5, 0.25]]), SHORT
    )
    weights = nearest(np.array([[1.0, 1.5], [1, 1.5], [1, 0.75], [1.5, 0.75], [1.5, 1], [1.5, 0.25]]), SHORT)
    legal, worst = enclosed(rows, weights, SHORT), np.zeros((3, 2))
    exact = rows @ weights
    for order in permutations(range(6)):
        worst = np.maximum(worst, np.abs(core_of(SHORT, terms).run(rows[:, order], weights[[*order]]) - exact))
    assert (worst <= legal.r).all()
    assert (worst / legal.r).max() > 1 / 16


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(64, 3), (64, 300), (2, 2000)]))
def test_only_the_hard_radius_and_the_bias_know_of_cuts(seed: int, shape: tuple[int, int]) -> None:
    """A policy that does not truncate has no bias, and the same variance as one that does."""
    rng = np.random.default_rng(seed)
    x, w = (each + np.copysign(1, each) for each in (rng.standard_normal(shape), rng.standard_normal((shape[1], 2))))
    x, w = nearest(x, SHORT), nearest(w, SHORT)
    rounded, cut = (enclosed(x, w, SHORT, truncates) for truncates in (False, True))
    assert not rounded.biased
    assert np.array_equal(rounded.mid, cut.mid)
    assert np.array_equal(rounded.v, cut.v)
    assert (rounded.r <= cut.r).all()


# ---- statistics


def beyond(found: Any, legal: Enclosure) -> float:
    """The largest error without the bias, in standard deviations."""
    error = np.abs(found - legal.mid) - legal.bias
    return float((error / np.sqrt(legal.v)).max())


@pytest.mark.parametrize("kind", accumulators.KINDS)
@pytest.mark.parametrize("n", [64, 2048, pytest.param(LONG, marks=pytest.mark.slow)])
def test_no_long_cut_sum_is_improbable(n: int, kind: str) -> None:
    """The results of steps lose against the sign of the sum so far, the more the more bits a step has of its own."""
    x, w = accumulators.data(kind, n, "float16")
    legal, rng = bench.enclose(x, w, CUT), np.random.default_rng(4)
    for order in (np.arange(n), np.arange(n)[::-1], rng.permutation(n)):
        for aligned, terms in ((23, 4), (24, 4), (40, 4), (25, 16)):
            found = TensorCore(FLOAT16, aligned=aligned, terms=terms).run(x[None, order], w[order])[0]
            assert beyond(found, legal) < bench.LIMIT / 2
            assert (np.abs(found - legal.mid) <= legal.r).all()


@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
def test_the_bias_is_no_more_than_it_must_be(kind: str) -> None:
    """With signs that cancel, it is below a fiftieth of the radius, and some sums need a tenth of it."""
    x, w = accumulators.data(kind, LONG, "float16")
    legal = bench.enclose(x, w, CUT)
    lost = np.abs(TensorCore(FLOAT16, aligned=40, terms=4).run(x[None], w) - legal.mid)
    assert (legal.bias < legal.r / 50).all()
    assert (lost / legal.bias).max() > 1 / 10


def kernels(name: str, rows: Any, columns: Any) -> Any:
    """A product [T, N] by a kernel whose sums are cut off after four terms of TF32 factors."""
    return (
        {
            "as Ampere": TensorCore(TF32, aligned=24, terms=4),
            "with exact steps": TensorCore(TF32, aligned=40, terms=4),
            "as Hopper": TensorCore(TF32, aligned=25, terms=8),
        }[name]
        .run(rows, columns.T)
        .astype(np.float32)
    )


def factors(kind: str, seed: int, columns: int = 32) -> tuple[Any, Any]:
    """x [32, LONG] and w [columns, LONG], values of TF32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (32, LONG)) if kind == "outliers" else rng.standard_normal((32, LONG))
    w = rng.standard_normal((columns, LONG)) / math.sqrt(LONG)
    if kind == "one-signed":
        x, w = np.abs(x), np.abs(w)
    return nearest(x, TF32), nearest(w, TF32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "one-signed"])
@pytest.mark.parametrize("name", ["as Ampere", "with exact steps", "as Hopper"])
def test_an_honest_product_of_14336_terms_that_are_cut_passes(name: str, kind: str) -> None:
    x, w = factors(kind, 5)
    found = kernels(name, x, w)
    judgement = judge_linear(found, x.astype(np.float32), w.astype(np.float32), policy=CUT, explain=False)
    assert judgement, judgement.reason


WRONG = {
    "one term is lost": lambda x, w: accumulators.without((x[:, None] * w.T), slice(7000, 7001)),
    "the last 32 terms are lost": lambda x, w: accumulators.without(x[:, None] * w.T, slice(-32, None)),
    "float16 sums": lambda x, w: accumulators.narrow(x[:, None] * w.T, np.float16, 32),
    "14 bits are kept": lambda x, w: accumulators.aligned(x[:, None] * w.T, 16, 14),
}


CASES = [(name, kind) for name in WRONG for kind in ("gaussian", "outliers", "one-signed")]
CASES.remove(("one term is lost", "one-signed"))
"""Where all terms have one sign, legal sums lose several terms' worth: 14336 cuts of a 2^-24th, all toward zero."""


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_wrong_product_of_14336_terms_is_told_from_one_that_is_cut(name: str, kind: str) -> None:
    x, w = factors(kind, 6, columns=8)
    found = np.stack([WRONG[name](row, w) for row in x[:4]]).astype(np.float32)
    judgement = judge_linear(found, x[:4].astype(np.float32), w.astype(np.float32), policy=CUT, explain=False)
    assert not judgement


def test_a_product_with_factors_of_tf32_is_told_from_one_that_is_cut() -> None:
    """All bits of float32 in the factors, of which a tensor core reads 11."""
    rng = np.random.default_rng(8)
    x, w = rng.standard_normal((4, LONG), np.float32), rng.standard_normal((8, LONG), np.float32)
    found = (nearest(x, TF32) @ nearest(w, TF32).T).astype(np.float32)
    assert not judge_linear(found, x, w, policy=CUT, explain=False)


def test_a_policy_of_float16_sums_knows_the_exponents_of_subnormal_factors() -> None:
    """A tensor core aligns a subnormal factor as if it had the smallest normal exponent: others lose more bits."""
    small = np.array([[2.0**-24, 2.0**-14 * (1 + 2.0**-10)]])
    w = np.array([[1.0], [2.0**-4 * (1 + 2.0**-10)]])
    core = TensorCore(FLOAT16, aligned=23, terms=4)
    legal = EnclosureOps(policy("float16")).matmul(Enclosure(small), Enclosure(w))
    assert (np.abs(core.run(small, w) - legal.mid) <= legal.r).all()
