# SPDX-License-Identifier: Apache-2.0
"""DOT-1 and DOT-2: every element is the exact sum, rounded once. `Fraction` alone computes the expected values."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.arrays import Array, Grid
from refmoe.arithmetic.exact import dot, few, prepared_weight, slices

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]
SPECIAL = [0.0, -0.0, 5e-324, -5e-324, 2.0**-1022, 1.0, -1.0, 1 + 2.0**-52, 2.0**53, 1.7976931348623157e308, 2.0**-400]


def rounded(exact: Fraction) -> float:
    """The nearest float64, ties to even, as the conversion of Fraction is documented."""
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def expected_dot(a: Array, b: Array) -> float:
    """DOT-1 and DOT-2, read literally. a, b: [n]"""
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    wild = [u * v for u, v in pairs if not (math.isfinite(u) and math.isfinite(v))]
    if wild:
        return math.nan if any(map(math.isnan, wild)) or len(set(wild)) > 1 else wild[0]
    return rounded(sum((Fraction(u) * Fraction(v) for u, v in pairs), Fraction(0)))


def expected_matmul(a: Array, b: Array) -> Array:
    """a: [m, n]   b: [n, p]"""
    return np.array([[expected_dot(row, column) for column in b.T] for row in a]).reshape(len(a), b.shape[1])


def same_bits(a: Array, b: Array) -> bool:
    """Equal bit for bit, all NaNs being one."""
    nan = np.isnan(a)
    return a.shape == b.shape and np.array_equal(nan, np.isnan(b)) and a[~nan].tobytes() == b[~nan].tobytes()


def random_floats(rng: np.random.Generator, shape: tuple[int, ...], spread: int, middle: int = 0) -> Array:
    """Normal variates times powers of two up to 2^spread either way of 2^middle."""
    return np.ldexp(rng.standard_normal(shape), middle + rng.integers(-spread, spread + 1, shape))


def check(x: Array, stored: Array) -> None:
    """The law: linear, matmul and sum meet DOT-1 and DOT-2 for x [t, n] and stored [m, n], and so does sum of a row.

    So they do whether the proof on few values is never tried, where it seldom fails, or always.
    """
    wide = stored.astype(np.float64)
    weight, expected = dot.prepare(stored), expected_matmul(x, wide.T)
    sums = expected_matmul(x, np.ones((x.shape[1], 1)))[:, 0]
    for doubt in (0.0, few.DOUBT, math.inf):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(few, "DOUBT", doubt)
            assert same_bits(dot.linear(x, weight), expected)
            assert same_bits(dot.matmul(x, wide.T), expected)
            assert same_bits(dot.sum(x, -1), sums)
            assert same_bits(dot.sum(x.T, 0), sums)
            for row, expected_sum in zip(x, sums, strict=True):
                assert same_bits(np.asarray(dot.sum(row, 0)), expected_sum)


@pytest.fixture
def exact_path(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the sums that took the exact path."""
    taken: list[int] = []
    exact_dot = dot.exact_dot

    def counted(a: Array, b: Array) -> float:
        taken.append(len(a))
        return exact_dot(a, b)

    monkeypatch.setattr(dot, "exact_dot", counted)
    return taken


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.sampled_from([0, 3, 30, 300]), st.sampled_from(DTYPES))
def test_products_are_the_exact_sum_rounded_once(seed: int, n: int, spread: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    stored = random_floats(rng, (4, n), min(spread, 6) if dtype == np.float16 else spread // 3)
    check(random_floats(rng, (3, n), spread), stored.astype(dtype))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(-1074, 1000), st.integers(-1074, 1000))
def test_from_subnormal_to_overflow(seed: int, n: int, a_exponent: int, b_exponent: int) -> None:
    rng = np.random.default_rng(seed)
    check(random_floats(rng, (2, n), 20, a_exponent), random_floats(rng, (2, n), 20, b_exponent))


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_special_values(data: st.DataObject, n: int) -> None:
    value = st.sampled_from([*SPECIAL, math.inf, -math.inf, math.nan]) | st.floats()
    rows = st.lists(st.lists(value, min_size=n, max_size=n), min_size=2, max_size=2)
    check(np.array(data.draw(rows)), np.array(data.draw(rows)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(0, 200))
def test_cancellation_leaves_the_small_term(seed: int, n: int, depth: int) -> None:
    rng = np.random.default_rng(seed)
    half, b = random_floats(rng, (2, n), 10), random_floats(rng, (3, n), 10)
    small = np.ldexp(rng.standard_normal((2, 1)), -depth)
    order = rng.permutation(2 * n + 1)
    check(np.hstack([half, -half, small])[:, order], np.hstack([b, b, np.ones((3, 1))])[:, order])


def tie_rows(deciding: float) -> tuple[Array, Array]:
    """Sums halfway between two floats, below an even and an odd one, and a term that decides: [4, 5], [1, 5]."""
    x = np.array([[1.0, 2.0**-53], [1.0 + 2.0**-52, 2.0**-53], [-1.0, -(2.0**-53)], [2.0**53, 1.0]])
    tail = np.array([[deciding, 0.0, deciding]] * 4)
    return np.hstack([x, tail * [1, 1, -2]]), np.ones((1, 5))


@pytest.mark.parametrize("deciding", [0.0, 2.0**-106, -(2.0**-106), 2.0**-300, -(2.0**-300), 5e-324, -5e-324])
def test_ties_go_to_even_unless_the_smallest_term_decides(deciding: float) -> None:
    x, stored = tie_rows(deciding)
    check(x, stored)
    check(x / 3.0, stored * 3.0)
    for dtype in DTYPES:
        check(x, stored.astype(dtype))


def test_exactly_zero_is_positive_zero() -> None:
    x = np.array([[0.0, -0.0, -0.0], [1.0, -1.0, 0.0], [-0.0, -0.0, -0.0], [1 / 3, 2 / 3, -1.0]])
    w = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, 5.0]])
    results = [dot.linear(x, dot.prepare(w)), dot.matmul(x, w.T), dot.sum(x, 1)]
    assert all(not np.signbit(result[result == 0]).any() for result in results)
    check(x, w)
    check(np.array([[-0.0]]), np.array([[1.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_shapes(dtype: Any) -> None:
    none = dot.prepare(np.zeros((3, 0), dtype))
    assert same_bits(dot.linear(np.zeros((2, 5, 0)), none), np.zeros((2, 5, 3)))
    assert dot.linear(np.zeros((2, 0, 4)), dot.prepare(np.ones((3, 4), dtype))).shape == (2, 0, 3)
    assert dot.linear(np.zeros((2, 4)), dot.prepare(np.ones((0, 4), dtype))).shape == (2, 0)
    assert same_bits(dot.matmul(np.zeros((2, 3, 0)), np.zeros((0, 4))), np.zeros((2, 3, 4)))
    assert dot.matmul(np.zeros((0, 3, 2)), np.zeros((0, 2, 4))).shape == (0, 3, 4)
    assert same_bits(dot.sum(np.zeros((2, 0, 4)), 1), np.zeros((2, 4)))
    assert dot.sum(np.zeros((0, 4)), 1).shape == (0,)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from([1, 20]))
def test_order_and_blocks_change_no_bit(seed: int, dtype: Any, spread: int) -> None:
    rng = np.random.default_rng(seed)
    x, stored = random_floats(rng, (6, 200), spread), rng.standard_normal((9, 200)).astype(dtype)
    wide, whole = stored.astype(np.float64), dot.linear(x, dot.prepare(stored))
    order, rows = rng.permutation(200), rng.permutation(6)
    assert same_bits(dot.linear(x[:, order], dot.prepare(stored[:, order])), whole)
    assert same_bits(dot.linear(x[rows], dot.prepare(stored)), whole[rows])
    assert same_bits(dot.matmul(x[:, order], wide.T[order]), whole)
    assert same_bits(np.vstack([dot.linear(x[i : i + 1], dot.prepare(stored)) for i in range(6)]), whole)
    assert same_bits(np.hstack([dot.linear(x, dot.prepare(stored[j : j + 4])) for j in (0, 4, 8)]), whole)
    assert same_bits(dot.linear(x.reshape(2, 3, 200), dot.prepare(stored)).reshape(6, 9), whole)
    assert same_bits(dot.sum(x[:, order], 1), dot.sum(np.asfortranarray(x).T, 0))


def test_batches_and_strides_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "DOUBT", 0.0)
    rng = np.random.default_rng(5)
    a, b = random_floats(rng, (2, 3, 5, 40), 4), random_floats(rng, (3, 7, 40), 4).transpose(0, 2, 1)
    whole = dot.matmul(a, b)
    assert same_bits(whole, np.array([[dot.matmul(a[i, j], b[j].copy()) for j in range(3)] for i in range(2)]))
    assert same_bits(whole[1, 2], expected_matmul(a[1, 2], b[2]))
    sums, tokens = dot.sum(a, -2), rng.standard_normal((50, 40))
    weight = dot.prepare(b[0].T)
    products = dot.linear(tokens, weight)
    monkeypatch.setattr(dot, "IN_CACHE", 100)
    monkeypatch.setattr(dot, "CHUNK", 100)
    assert same_bits(dot.matmul(a, b), whole)
    assert same_bits(dot.sum(a, -2), sums)
    assert same_bits(dot.linear(tokens, weight), products)


@pytest.mark.parametrize(("dtype", "scale"), [(ml_dtypes.bfloat16, 1), (np.float32, 1), (np.int16, 1 / 8192)])
def test_rows_of_full_length(dtype: Any, scale: float, exact_path: list[int]) -> None:
    rng = np.random.default_rng(6)
    n = 14336
    drawn = rng.standard_normal((40, n)) if scale == 1 else 2 * rng.integers(0, 256, (40, n)) - 255
    stored = drawn.astype(dtype) if scale == 1 else (drawn * scale).astype(ml_dtypes.bfloat16)
    x = rng.standard_normal((8, n))
    wide, result = stored.astype(np.float64), dot.linear(x, dot.prepare(stored))
    assert len(exact_path) <= 3
    assert same_bits(dot.matmul(x, wide.T), result)
    for t, j in rng.integers(0, [8, 40], (6, 2)).tolist():
        assert result[t, j] == expected_dot(x[t], wide[j])
    assert dot.sum(x, 1)[3] == expected_dot(x[3], np.ones(n))


def test_remainders_few_and_many_and_wild_rows() -> None:
    rng = np.random.default_rng(7)
    few = rng.standard_normal((6, 900)).astype(ml_dtypes.bfloat16)
    few[[1, 1, 4], [0, 800, 0]] = ml_dtypes.bfloat16(2.0**-40 / 3)
    assert (remainder := dot.prepare(few).remainder) is not None
    assert remainder.columns is not None
    many = rng.standard_normal((6, 900))
    assert (remainder := dot.prepare(many).remainder) is not None
    assert remainder.columns is None
    wild = random_floats(rng, (6, 30), 300)
    wild[2, 3], wild[4, 5] = math.inf, math.nan
    assert dot.prepare(wild).wild
    tiny_left = np.array([[1.0, 2.0**-900, 1e-320], [1.0, 1.0, 1.0]])
    for stored in (few, many, wild, tiny_left):
        check(random_floats(rng, (3, stored.shape[1]), 2), stored)
    assert dot.prepare(few).nbytes >= few.size * 8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(-126, 120), st.sampled_from([0, 8, 30, 60]))
def test_a_known_grid_changes_no_bit(seed: int, n: int, exponent: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    stored = np.ldexp((2 * rng.integers(0, 256, (3, n)) - 255).astype(np.float32), exponent)
    x = random_floats(rng, (5, n), spread)
    expected = expected_matmul(x, stored.astype(np.float64).T)
    for weight in (dot.prepare(stored), dot.prepare(stored, grid=Grid(exponent, 255))):
        assert weight.holds_inputs
        assert same_bits(dot.linear(x, weight), expected)


@pytest.mark.parametrize("grid", [Grid(-401, 255), Grid(-400, 255), Grid(392, 255), Grid(391, 255), Grid(0, 2**40)])
def test_a_grid_out_of_range_is_not_relied_on(grid: Grid) -> None:
    rng = np.random.default_rng(4)
    stored = np.ldexp(rng.integers(-grid.most, grid.most + 1, (3, 20)).astype(np.float64), grid.exponent)
    x = random_floats(rng, (5, 20), 30)
    assert same_bits(dot.linear(x, dot.prepare(stored, grid=grid)), expected_matmul(x, stored.T))


@given(st.integers(0, 2**32), st.integers(1, 400), st.integers(1, 20), st.integers(-100, 100))
def test_the_widest_slices_are_within_the_proof(seed: int, n: int, most_bits: int, exponent: int) -> None:
    """With integers B of the weight, 2^width sum |B| is at most 2^53, and the leading slice is the weight."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(-(2**most_bits), 2**most_bits + 1, (4, n))
    sample = np.ldexp(whole.astype(np.float64), exponent)
    width = prepared_weight.widest(sample, np)
    assert 0 < width <= prepared_weight.WIDEST
    assert not prepared_weight.take_leading(sample, width, np)[1].any()
    sigma = prepared_weight.row_sigma(np.abs(sample).sum(axis=1, keepdims=True), n, width)
    for row, unit in zip(sample.tolist(), (sigma[:, 0] / 1.5 * 2.0**-52).tolist(), strict=True):
        integers = [Fraction(value) / Fraction(unit) if unit else Fraction(0) for value in row]
        assert all(value.denominator == 1 for value in integers)
        assert 2**width * sum(map(abs, integers)) <= 2**53
    if (known := dot.slices_for(Grid(exponent, 2**most_bits), n)) is not None:
        assert known[0] == 2
        assert 0 < known[1] <= width
        assert 2 ** known[1] * n * 2**most_bits <= 2**53


@pytest.mark.parametrize("share", [-1.0, 2.0])
def test_the_product_with_what_slices_leave_changes_no_bit(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed always, or never, instead of where many elements are in doubt."""
    monkeypatch.setattr(dot, "MOST_UNSURE", share)
    check_fixed_inputs()
    rng = np.random.default_rng(11)
    x = random_floats(rng, (6, 90), 40)
    check(x, rng.integers(-9, 10, (5, 90)).astype(np.float32))


@pytest.mark.parametrize("tail", [2.0**-130, -(2.0**-130), 0.0])
def test_the_exact_path_decides_what_the_bound_cannot(tail: float, exact_path: list[int]) -> None:
    x = np.array([[1.0, 2.0**-53, tail, 2.0**-200]])
    runs: list[Callable[[], Array]] = [
        lambda: dot.matmul(x, np.ones((4, 1))),
        lambda: dot.linear(x, dot.prepare(np.ones((1, 4)))),
        lambda: dot.sum(x, 1),
    ]
    for run in runs:
        exact_path.clear()
        assert run().item() == (1.0 if tail < 0 else 1 + 2.0**-52)
        assert exact_path == [4]


@given(
    st.integers(0, 2**32), st.sampled_from([1, 2, 12, dot.SHORT, dot.SHORT + 1]), st.sampled_from([-520, -380, 0, 380])
)
def test_both_exact_paths_are_the_exact_sum_rounded_once(seed: int, n: int, middle: int) -> None:
    """From products that underflow to such that overflow nearly, and where all but the last bits cancel."""
    rng = np.random.default_rng(seed)
    a, b = random_floats(rng, (2, n), 20, middle)
    half = n // 2
    a[:half], b[:half] = -a[n - half :], b[n - half :] * (1 + 2.0**-52)
    assert same_bits(np.array(dot.exact_dot(a, b)), np.array(expected_dot(a, b)))
    a[-1] = 5e-324
    assert same_bits(np.array(dot.exact_dot(a, b)), np.array(expected_dot(a, b)))


def test_an_input_that_has_changed_in_place_is_split_anew() -> None:
    """Products in turn share the slices of an equal input: of these bytes, this shape, for a weight of this width."""
    rng = np.random.default_rng(12)
    x = rng.standard_normal((4, 12))
    narrow, wide = (rng.integers(-(2**bits), 2**bits, (5, 12)).astype(np.float64) for bits in (4, 20))
    wide[:, 6:] = 0
    assert dot.prepare(wide).width == dot.prepare(wide[:, :6]).width != dot.prepare(narrow).width
    for stored in (narrow, wide, wide[:, :6]):
        rows, weight = x.reshape(-1, stored.shape[1]), dot.prepare(stored)
        assert same_bits(dot.linear(rows, weight), expected_matmul(rows, stored.T))
    x[0, 0] += 1.0
    assert same_bits(dot.linear(rows, weight), expected_matmul(rows, stored.T))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_products_of_short_values_take_no_exact_path(dtype: Any, exact_path: list[int]) -> None:
    """Sums of products of float32 values often have 54 bits. Then they are ties, which no bound decides."""
    rng = np.random.default_rng(3)
    x, y = (random_floats(rng, (40, 64), 3).astype(dtype).astype(np.float64) for _ in range(2))
    found = dot.matmul(x, y.T)
    assert not exact_path
    assert same_bits(found, expected_matmul(x, y.T))


def mistaken_split(x: Array, sigma: Array, width: int, pieces: Any) -> tuple[int, Array | None]:
    count, rest = slices.split(x, sigma, width, pieces)
    pieces[count - 1][...] = 0
    return count, rest


def unrounded_two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    return a + b, np.zeros_like(a + b)


def fused(a: float, b: float, c: float) -> float:
    return rounded(Fraction(a) * Fraction(b) + Fraction(c))


def fused_matmul(a: Array, b: Array, xp: Any = np) -> Array:
    result = np.zeros((len(a), b.shape[1]))
    for i, j in np.ndindex(result.shape):
        total = 0.0
        for u, v in zip(a[i].tolist(), b[:, j].tolist(), strict=True):
            total = fused(u, v, total)
        result[i, j] = total
    return result


def plain_linear(x: Array, weight: Any, xp: Any = np) -> Array:
    return np.asarray(x @ np.array([weight.row(j, np) for j in range(len(weight.top))]).T)


def unproven_taken(value: Array, unsure: Array | None, exact: Any, xp: Any) -> Array:
    return value


def uncounted(x: dot.SlicedRows, multiplied: bool = True) -> Array:
    return x.top * (2.0**-90 if multiplied else 0.0)


few_slice_of = few.slice_of


def nothing_left(*arguments: Any) -> tuple[Array, Array]:
    piece, rest = few_slice_of(*arguments)
    rest[...] = 0
    return piece, rest


MISTAKES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "the last slice is dropped": (dot, "split", mistaken_split),
    "the bound on the remainder is zero": (dot, "remainder_bound", lambda rest, axis, xp: 0.0),
    "what is left and not multiplied is not counted": (dot.SlicedRows, "bound", uncounted),
    "the error of a sum is dropped": (dot, "two_sum", unrounded_two_sum),
    "np.sum": (dot, "sum", lambda x, axis, xp=np: x.sum(axis)),
    "a @ b": (dot, "matmul", lambda a, b, xp=np: a @ b),
    "x @ w.T": (dot, "linear", plain_linear),
    "fused multiply-adds": (dot, "matmul", fused_matmul),
    "an exact path by fsum of rounded products": (dot, "exact_dot", lambda a, b: math.fsum((a * b).tolist())),
    "few: the bound is nearly zero": (few, "bound_per_unit", lambda n, width: 2.0**-200),
    "few: what a slice leaves is dropped": (few, "slice_of", nothing_left),
    "few: what a slice leaves is taken for a slice": (few, "is_slice", lambda rest, e, width: True),
    "few: what is not safe is not seen": (
        few,
        "top_of",
        lambda size: (top := float(size.max()), math.frexp(top)[1]),
    ),
    "what is not proven is taken": (dot, "decide", unproven_taken),
    "few: no test": (few, "rounded", lambda high, low, bound: (high + low + 0.0, None)),
}


def fixed_inputs() -> Iterator[tuple[Array, Array]]:
    rng = np.random.default_rng(8)
    for spread in (0, 20, 60):
        yield random_floats(rng, (4, 50), spread), rng.standard_normal((30, 50)).astype(np.float32)
    for tail in (2.0**-130, -(2.0**-130)):
        for last in (2.0**-200, 2.0**-90):
            yield np.array([[1.0, 2.0**-53, tail, last * 2.0**-53]]), np.ones((1, 4))
    # nearer to a tie than the roundings of an ordinary sum of the remainders, which cancel
    left = np.ldexp(rng.standard_normal((200, 8)), -33)
    near = 2.0**-53 + np.ldexp(rng.standard_normal((200, 1)), -85)
    yield np.hstack([np.ones((200, 1)), left, near, -left[:, ::-1]]), np.ones((1, 18))
    yield np.array([[1 / 3, -(2.0**-120)]]), np.array([[3.0, 1.0]])  # the exact product is 1 - 2^-54, rounded it is 1
    yield np.array([[1.0, 2.0**-53, 3e-130]]), np.array([[1.0, 1.0, 1 / 3]])
    # what the slice leaves cancels but for a term that its sum in float64 would round
    third, last = 2.0**-46 / 3, 2.0**-75 * (1 + 2.0**-52)
    yield np.array([[1.5, -1.5, third, last, -third]]), np.ones((1, 5))
    yield random_floats(rng, (3, 6), 3, -520), random_floats(rng, (4, 6), 3, -520)  # the products are subnormal
    half, b = random_floats(rng, (2, 20), 10), random_floats(rng, (3, 20), 10)
    yield np.hstack([half, -half, half[:, :1]]), np.hstack([b, b, b[:, :1] * 2.0**-120])


def check_fixed_inputs() -> None:
    for x, stored in fixed_inputs():
        check(x, stored)


def test_the_fixed_inputs_pass_without_a_mistake() -> None:
    check_fixed_inputs()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check_fixed_inputs()


def test_fusing_the_products_of_slices_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "DOUBT", 0.0)
    rng = np.random.default_rng(9)
    x, stored = random_floats(rng, (3, 12), 10), rng.standard_normal((5, 12)).astype(np.float32)
    weight = dot.prepare(stored)
    plain = dot.linear(x, weight)
    monkeypatch.setattr(dot, "times", lambda x, weight, xp: fused_matmul(x, weight.T))
    monkeypatch.setattr(prepared_weight, "times", lambda x, weight, xp: fused_matmul(x, weight.T))
    assert same_bits(dot.linear(x, weight), plain)


DIGESTS = """
import hashlib, ml_dtypes, numpy as np
from refmoe.arithmetic.exact import dot
rng = np.random.default_rng(10)
x, w = rng.standard_normal((24, 700)), rng.standard_normal((300, 700)).astype(np.float32)
a, b = rng.standard_normal((3, 90, 130)), rng.standard_normal((3, 130, 110))
weights = [w, w.astype(ml_dtypes.bfloat16)]
exact = [dot.linear(x, dot.prepare(v)) for v in weights] + [dot.matmul(a, b), dot.sum(a, 1), dot.sum(x, -1)]
plain = [x @ w.astype(np.float64).T, a @ b]
for arrays in (exact, plain):
    print(hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())
"""


def survives(environment: dict[str, str]) -> bool:
    """Whether NumPy alone can multiply under this kernel: the processor may lack it, and OpenBLAS 0.3.34 may crash."""
    product = "import numpy; numpy.ones((300, 700)) @ numpy.ones((700, 24))"
    return subprocess.run([sys.executable, "-c", product], env=environment, check=False).returncode == 0


def test_one_digest_over_blas_kernels_and_threads() -> None:
    exact, plain = set(), set()
    for kernel in ("Prescott", "Nehalem", "Sandybridge", "Haswell", "Zen", "SkylakeX"):
        for threads in ("1", "2"):
            environment = {**os.environ, "OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": threads}
            run = subprocess.run([sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True)
            if run.returncode < 0 and not survives(environment):
                continue
            assert run.returncode == 0, run.stderr
            digests = run.stdout.split()
            exact.add(digests[0])
            plain.add(digests[1])
    assert len(plain) > 1  # otherwise too few kernels ran for a comparison
    print(f"\ndistinct digests over kernels and threads: exact {len(exact)}, a @ b {len(plain)}")
    assert len(exact) == 1
