# SPDX-License-Identifier: Apache-2.0
"""Products by a tensor core that is described by data: every order and split is inside, and none is improbable."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import accumulators
from refmoe.arithmetic.enclosure.tensor_core import product
from refmoe.arithmetic.formats import FLOAT32, nearest
from refmoe.arithmetic.tensor_core import E4M3, E5M2, TENSOR_CORES, TensorCore

SMALL = [
    TensorCore(E4M3, aligned=3, terms=2, kept=3, promoted=4),
    TensorCore(E5M2, aligned=2, terms=3, kept=4),
    TensorCore(E4M3, aligned=1, terms=2, kept=1),
]
"""Cores that lose most of a term, so that their errors reach far."""


def codes(draw: Any, shape: tuple[int, int], inputs: Any) -> Any:
    """Values of the format, subnormal ones, zeros and powers of two included."""
    exponents = st.integers(inputs.exponent_min - inputs.precision + 1, min(inputs.exponent_max, 3))
    value = st.one_of(
        st.just(0.0),
        exponents.map(lambda e: 2.0**e),
        st.floats(-8, 8, width=32),
    )
    flat = draw(st.lists(value, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return nearest(np.reshape(flat, shape), inputs)


def exactly(x: Any, w: Any) -> list[list[Fraction]]:
    return [
        [sum((Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True)), Fraction()) for column in w.T]
        for row in x
    ]


def slowly(x: Any, w: Any, core: TensorCore) -> Fraction:
    """One element as the model's paper says it, in rational numbers.   x, w: [n]"""

    def power(value: Fraction, least: int) -> int:
        size, e = abs(value), 0
        while size >= 2:
            size, e = size / 2, e + 1
        while size < 1:
            size, e = size * 2, e - 1
        return max(e, least)

    def cut(value: Fraction, unit: Fraction) -> Fraction:
        return Fraction(int(value / unit)) * unit

    total = np.float32(0)
    chain = core.chain(len(x))
    for start in range(0, len(x), chain):
        held = Fraction(0)
        for first in range(start, min(start + chain, len(x)), core.terms):
            pairs = [(Fraction(a), Fraction(b)) for a, b in zip(x, w, strict=True)]
            pairs = [each for each in pairs[first : min(first + core.terms, start + chain)] if each[0] and each[1]]
            tops = [power(a, core.inputs.exponent_min) + power(b, core.inputs.exponent_min) for a, b in pairs]
            tops += [power(held, -126)] if held else []
            if not tops:
                continue
            unit = Fraction(2) ** (max(tops) - core.aligned)
            held = cut(held, unit) + sum((cut(a * b, unit) for a, b in pairs), Fraction())
            held = cut(held, Fraction(2) ** (power(held, -126) - core.kept)) if held else held
        total = total + np.float32(float(held))
    return Fraction(float(total))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bits_are_those_of_the_model_in_rational_numbers(data: Any) -> None:
    core = data.draw(st.sampled_from([*SMALL, *TENSOR_CORES.values()]))
    n = data.draw(st.integers(1, 40))
    x, w = codes(data.draw, (2, n), core.inputs), codes(data.draw, (n, 2), core.inputs)
    found = core.run(x, w)
    assert [[Fraction(each) for each in row] for row in found] == [
        [slowly(row, column, core) for column in w.T] for row in x
    ]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_sum_leaves_the_interval(data: Any) -> None:
    """Any order of any terms, and in any number of parts that are added in float32."""
    core = data.draw(st.sampled_from([*SMALL, TENSOR_CORES["hopper-fp8"], TENSOR_CORES["ada-fp8"]]))
    n = data.draw(st.integers(1, 12))
    x, w = codes(data.draw, (2, n), core.inputs), codes(data.draw, (n, 2), core.inputs)
    order = np.array(data.draw(st.permutations(range(n))))
    parts = np.array_split(order, data.draw(st.integers(1, n)))
    legal = product(x, w, core)
    total = np.zeros((2, 2))
    for part in parts:
        total = nearest(total + core.run(x[:, part], w[part]), FLOAT32)
    for found, exact, radius in zip(total.flat, np.ravel(exactly(x, w)), legal.radius.flat, strict=True):
        assert abs(Fraction(found) - exact) <= Fraction(radius)


@pytest.mark.parametrize("core", SMALL)
def test_every_order_of_six_terms_is_inside_and_the_worst_is_near(core: TensorCore) -> None:
    """All 720 orders of hard rows: equal signs, one large term, terms that cancel."""
    rows = np.array([[1.875, 1, 1, 1, 1, 1], [7.5, 0.5, 0.5, 0.5, 0.5, 0.5], [4, -4, 1.75, -1.5, 0.5, 0.25]])
    x, w = nearest(rows, core.inputs), np.ones((6, 1))
    legal = product(x, w, core)
    worst = np.zeros((3, 1))
    for order in permutations(range(6)):
        worst = np.maximum(worst, np.abs(core.run(x[:, order], w[[*order]]) - legal.mid))
    assert (worst <= legal.radius).all()
    assert (worst / legal.radius).max() > 1 / 16


@pytest.mark.parametrize("kind", accumulators.KINDS)
@pytest.mark.parametrize("name", ["hopper-fp8", "hopper-fp8-fast", "ada-fp8"])
def test_long_honest_sums_are_inside_and_never_improbable(name: str, kind: str) -> None:
    """Also in another order of steps and in parts. The deviation is an upper size: no error is many times as large."""
    core, rng = TENSOR_CORES[name], np.random.default_rng(5)
    x, w = accumulators.data(kind, 2048, "float16")
    x, w = nearest(np.clip(x, -400, 400), core.inputs)[None], nearest(w[:, :64] * 8, core.inputs)
    legal = product(x, w, core)
    blocks = rng.permutation(2048 // 128)
    order = (blocks[:, None] * 128 + np.arange(128)).reshape(-1)
    halves = core.run(x[:, :1024], w[:1024]) + core.run(x[:, 1024:], w[1024:])
    for found in (core.run(x, w), core.run(x[:, ::-1], w[::-1]), core.run(x[:, order], w[order]), halves):
        error = np.abs(found - legal.mid)
        assert (error <= legal.radius).all()
        assert (error / np.sqrt(legal.variance)).max() < 3


def test_a_missing_promotion_and_a_dropped_term_are_far_outside_the_spread() -> None:
    core, rng = TENSOR_CORES["hopper-fp8"], np.random.default_rng(6)
    x, w = (nearest(np.abs(rng.standard_normal(shape)), E4M3) for shape in ((4, 4096), (4096, 16)))
    legal = product(x, w, core)
    fast = replace(core, promoted=None).run(x, w)
    assert (np.abs(fast - legal.mid) / np.sqrt(legal.variance)).min() > 10
    assert (np.abs(fast - legal.mid) > legal.radius).all()
