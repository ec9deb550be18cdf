# SPDX-License-Identifier: Apache-2.0
"""Double-double arithmetic: the error-free transforms are exact, and the other operations keep about 100 bits."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flint import arb, ctx
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.exact import double_double as dd
from refmoe.arithmetic.exact import elementary

moderate = st.floats(-(2.0**300), 2.0**300).filter(lambda x: x == 0 or abs(x) > 2.0**-300)


def exact(pair: Any) -> Fraction:
    return Fraction(float(pair[0])) + Fraction(float(pair[1]))


@pytest.fixture
def precise() -> Any:
    with ctx.workprec(300):
        yield


@given(moderate, moderate)
def test_transforms_lose_nothing(a: float, b: float) -> None:
    assert exact(dd.two_sum(a, b)) == Fraction(a) + Fraction(b)
    large, small = sorted((a, b), key=abs, reverse=True)
    assert exact(dd.fast_two_sum(large, small)) == Fraction(a) + Fraction(b)
    assert exact(dd.split(a)) == Fraction(a)
    assert exact(dd.two_product(a, b)) == Fraction(a) * Fraction(b)


@given(moderate, moderate.filter(bool))
def test_a_remainder_of_a_division_is_exact(a: float, b: float) -> None:
    assert Fraction(dd.remainder(a, a / b, b)) == Fraction(a) - Fraction(a / b) * Fraction(b)


@given(moderate)
def test_halves_of_a_split_have_26_bits(a: float) -> None:
    for half in dd.split(a):
        mantissa = abs(Fraction(half).numerator)
        assert (mantissa >> ((mantissa & -mantissa).bit_length() - 1) if mantissa else 0).bit_length() <= 26


def pairs(rng: np.random.Generator, n: int) -> Any:
    high = rng.uniform(0.5, 2, n) * np.exp2(rng.integers(-20, 20, n)) * rng.choice([-1, 1], n)
    return dd.fast_two_sum(high, rng.uniform(-0.5, 0.5, n) * np.spacing(np.abs(high)))


def test_arithmetic_keeps_its_bounds() -> None:
    rng = np.random.default_rng(3)
    x, y = pairs(rng, 3000), pairs(rng, 3000)
    sums, products, quotients = dd.add(x, y), dd.multiply(x, y), dd.divide(x, y[0])
    for i in range(3000):
        a, b = exact((x[0][i], x[1][i])), exact((y[0][i], y[1][i]))
        divisor = Fraction(float(y[0][i]))
        assert abs(exact((sums[0][i], sums[1][i])) - (a + b)) <= max(abs(a), abs(b)) / 2**104
        assert abs(exact((products[0][i], products[1][i])) - a * b) <= abs(a * b) / 2**103
        assert abs(exact((quotients[0][i], quotients[1][i])) - a / divisor) <= abs(a / divisor) / 2**103


@pytest.mark.usefixtures("precise")
def test_exp_and_log_keep_their_bounds() -> None:
    rng = np.random.default_rng(4)
    high = np.concatenate([rng.uniform(-600, 600, 300), rng.uniform(-1, 1, 300), [0.0, -1e-30, 355.0]])
    x = dd.fast_two_sum(high, rng.uniform(-0.5, 0.5, len(high)) * np.spacing(np.abs(high)))
    e = dd.exp(x)
    for x1, x2, e1, e2 in zip(*map(np.ndarray.tolist, (*x, *e)), strict=True):
        real = (arb(x1) + arb(x2)).exp()
        assert abs(arb(e1) + arb(e2) - real) < real * arb(2) ** -96
    v = np.concatenate([np.exp2(rng.uniform(-512, 512, 300)), 1 + rng.uniform(-0.1, 0.1, 100), [1.0, 1e6, 2.0**512]])
    logarithm = dd.log(v, near=elementary.log(v))
    for x0, l1, l2 in zip(v.tolist(), *map(np.ndarray.tolist, logarithm), strict=True):
        real = arb(x0).log()
        assert abs(arb(l1) + arb(l2) - real) < (1 + abs(real)) * arb(2) ** -94


def test_powers_of_two_are_exact() -> None:
    k = np.arange(-1022, 1024)
    assert np.array_equal(dd.power_of_two(k), np.ldexp(1.0, k))


@pytest.mark.usefixtures("precise")
def test_constants_are_those_of_arb() -> None:
    ln2 = arb(2).log()
    assert float(dd._LN2_1) * 2**42 == round(float(dd._LN2_1) * 2**42) < 2**42
    for part, left in ((dd._LN2_1, ln2), (dd._LN2_2, ln2 - arb(dd._LN2_1))):
        assert abs(left - arb(part)) <= arb(2) ** (-43 if part is dd._LN2_1 else -85)
    left = ln2 - arb(dd._LN2_1) - arb(dd._LN2_2)
    assert abs(left - arb(dd._LN2_3)) < abs(left) * arb(2) ** -53
    assert abs(1 / ln2 - arb(dd._LN2_INVERSE)) < arb(2) ** -53
    assert dd._SPLITTER == 2**27 + 1
    assert (Fraction(dd._LN2_2) * 2**86).denominator == 1
    assert Fraction(dd._LN2_2) * 2**86 < 2**42
