# SPDX-License-Identifier: Apache-2.0
"""Sums in float32 enclose those in binary64, whatever the scale, and are hardly larger for ordinary numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.enclosure import narrow
from refmoe.arithmetic.enclosure.array import OWN, UNDERFLOW, Enclosure, bounded
from refmoe.arithmetic.enclosure.matrices import Matrix, Squares, Sums
from refmoe.arithmetic.enclosure.products import Accumulator, product
from refmoe.arithmetic.formats import BFLOAT16, CACHED, FLOAT16, FLOAT32, FLOAT64, FORMATS, largest, nearest
from refmoe.arithmetic.memory import lasting
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from tests.arithmetic.enclosure.legal import KINDS, draw

BOUNDS = ("total", "energy", "inherited", "variance")
SPECIAL = (0.0, np.inf, -np.inf, np.nan, 2.0**-1074, 2.0**1023, 1.0)


@dataclass
class All(Sums, Squares):
    """All sums of a product."""


def both(x: Enclosure, rows: Any, held: Any = FLOAT32) -> tuple[All, All]:
    """The sums of x times the transpose of stored rows, in float32 and in binary64."""
    matrix = narrow.matrix_of(rows, held, 0)
    assert isinstance(matrix, narrow.NarrowMatrix)
    wide = Matrix(Enclosure(np.asarray(rows, np.float64).T))
    with np.errstate(all="ignore"):
        found, expected = (
            All(**vars(each.squares(x).rows(slice(None))), **vars(each.sums(x, None).rows(slice(None))))
            for each in (matrix, wide)
        )
    return found, expected


def scales(rng: np.random.Generator, shape: Any, exponent: int) -> Any:
    """Magnitudes around 10^exponent, and in some rows far apart."""
    apart = rng.choice([0, 1, 40, 300]) if exponent == 0 else rng.choice([0, 1, 5])
    with np.errstate(all="ignore"):
        return rng.standard_normal(shape) * 10.0**exponent * 10.0 ** rng.uniform(-apart, apart, shape)


def with_special(rng: np.random.Generator, x: Any, share: float) -> Any:
    return np.where(rng.random(x.shape) < share, rng.choice(SPECIAL, x.shape), x)


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 700),
    exponent=st.sampled_from([-300, -160, -40, 0, 40, 160, 300]),
    special=st.sampled_from([0.0, 0.01, 0.5]),
    inexact=st.booleans(),
    kind=st.sampled_from(KINDS),
)
def test_sums_in_float32_enclose_those_in_binary64(
    seed: int, n: int, exponent: int, special: float, inexact: bool, kind: str
) -> None:
    """Elements of x of any size, infinities and NaN included; zeros and subnormal numbers in the matrix."""
    rng = np.random.default_rng(seed)
    x = with_special(rng, scales(rng, (3, n), exponent), special)
    rows = np.where(rng.random((4, n)) < 0.2, 0.0, rng.standard_normal((4, n))).astype(np.float32)
    rows = np.where(rng.random((4, n)) < 0.1, draw(rng, kind, (4, n), FLOAT32) * np.float32(2.0**-40), rows)
    radius, variance = (
        np.abs(with_special(rng, scales(rng, (3, n), int(rng.choice([exponent, -30, 0]))), special)) for _ in "rv"
    )
    radius, variance = (np.where(np.isnan(each), np.inf, each) for each in (radius, variance))
    given_x = Enclosure(x, radius, variance) if inexact else Enclosure(x)
    found, expected = both(given_x, rows.astype(np.float32))
    with np.errstate(all="ignore"):
        # binary64 adds up in any order; by Minkowski, roots of sums of squares differ no more than the numbers do
        own = (n + 2) * OWN * expected.total + n * UNDERFLOW
        roots = [np.sqrt(np.minimum(sums.path, 2.0**1000)) for sums in (found, expected)]
        for apart, most in ((found.mid - expected.mid, own), (roots[0] - roots[1], math.sqrt(n) * (2 * own + 1e-150))):
            assert ((np.abs(apart) <= most) | ~np.isfinite(most)).all()
    for name in BOUNDS:
        # the rules take NaN, such as zero times infinity, for an infinite bound, and add `UNDERFLOW` themselves
        bound, least = (bounded(np.asarray(getattr(sums, name))) for sums in (found, expected))
        assert (bound + UNDERFLOW >= least).all(), name
    with np.errstate(all="ignore"):
        assert (bounded(found.least_total) <= bounded(expected.total * (1 + n * OWN)) + UNDERFLOW).all()


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", [1, 15, 64, 512, 4099])
def test_sums_of_ordinary_numbers_are_hardly_larger(stored: Any, n: int) -> None:
    rng = np.random.default_rng(n)
    x, rows = rng.standard_normal((5, n)), (rng.standard_normal((7, n)) / 8).astype(stored)
    found, expected = both(Enclosure(x, np.abs(x) / 256, x**2 / 2**16), rows)
    for name in (*BOUNDS, "path"):
        bound, least = getattr(found, name), getattr(expected, name)
        assert np.all(bound <= least * (1 + 1e-3)), name
    assert np.all(found.least_total >= expected.total * (1 - 2e-3))


@pytest.mark.parametrize("n", [20, 512, 611, 1792])
def test_each_part_of_a_large_product_is_in_its_place(n: int) -> None:
    """Several tiles of rows, several blocks of columns, and errors without a bound."""
    rng = np.random.default_rng(n)
    x, rows = rng.standard_normal((130, n)), rng.standard_normal((150, n)).astype(np.float32)
    x[rng.random(130) < 0.3] *= 2.0**-40
    radius = np.where(rng.random(x.shape) < 0.1 / n, np.inf, np.abs(x) / 256)
    rows[::3, :] = np.where(rng.random((50, n)) < 0.9, 0.0, rows[::3, :])
    found, expected = both(Enclosure(x, radius, x**2 / 2**16), rows)
    assert np.isinf(expected.inherited).any()
    for name in (*BOUNDS, "path"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-30, err_msg=name)
    np.testing.assert_allclose(found.mid, expected.mid, rtol=0, atol=1e-11)


def test_a_product_that_is_known_is_not_replaced() -> None:
    x, known = Enclosure(np.ones((3, 64))), np.zeros((3, 4))
    assert narrow.matrix_of(np.ones((4, 64), np.float32), FLOAT32, 0).sums(x, known).mid is known


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 60))
def test_sums_in_float32_are_bounds_of_the_exact_ones(seed: int, n: int) -> None:
    """Held against sums of fractions, which do not round."""
    rng = np.random.default_rng(seed)
    x = scales(rng, (1, n), 0)
    rows = draw(rng, "lognormal", (2, n), FLOAT32).astype(np.float32)
    found, _ = both(Enclosure(x), rows)
    for column, row in enumerate(rows.tolist()):
        terms = [Fraction(a) * Fraction(b) for a, b in zip(x[0].tolist(), row, strict=True)]
        assert Fraction(float(found.least_total[0, column])) <= sum(map(abs, terms))
        for bound, exact in ((found.total, sum(map(abs, terms))), (found.energy, sum(each**2 for each in terms))):
            value = float(bound[0, column])
            # what binary64 loses below its smallest normal value is an allowance of the rules themselves
            assert value == np.inf or Fraction(value) + n * Fraction(UNDERFLOW) >= exact


@pytest.mark.parametrize(
    ("rows", "held", "fits"),
    [
        (np.ones((2, 3), np.float32), FLOAT32, True),
        (np.ones((2, 3), np.float64) / 3, FLOAT64, False),
        (np.ones((2, 3), np.float32), FLOAT64, True),
        (np.full((2, 3), 1 / 3, np.float64), BFLOAT16, True),
        (np.full((2, 3), 1e30, np.float32), FLOAT32, False),
        (np.full((2, 3), 1e30, np.float32), FLOAT16, False),
        (np.zeros((2, 3), np.float32), FLOAT32, False),
        (np.full((2, 3), np.nan, np.float32), FLOAT32, False),
    ],
)
def test_a_matrix_is_narrow_only_where_float32_serves(rows: Any, held: Any, fits: bool) -> None:
    matrix = narrow.matrix_of(rows, held, 0)
    assert isinstance(matrix, narrow.NarrowMatrix) == fits
    with np.errstate(over="ignore"):
        expected = rows.astype(held.dtype).astype(np.float64).T
    np.testing.assert_array_equal(matrix.mid, expected)
    assert matrix.fits(held)


def test_a_small_matrix_is_not_narrow() -> None:
    for size, fits in ((511, False), (512, True)):
        rows = np.ones((size, 512), np.float32)
        assert isinstance(narrow.matrix_of(rows, FLOAT32), narrow.NarrowMatrix) == fits


@pytest.mark.parametrize("held", [BFLOAT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_rounded_to_nearest_once(stored: Any, held: Any) -> None:
    """Values of every exponent of the narrower dtype, ties and values close to ties among them."""
    halves = 1 + np.arange(8) / 2.0 ** (held.precision + 1)
    powers = 2.0 ** np.arange(-24, 16)
    near = np.array([0.0, 2.0**-23, -(2.0**-23), 2.0**-40])
    rows = (powers[:, None, None] * (halves[:, None] + near)).reshape(len(powers), -1).astype(stored)
    expected = nearest(rows, held)
    np.testing.assert_array_equal(narrow.matrix_of(rows, held, 0).mid, expected.T)


def test_values_of_a_file_are_copied(tmp_path: Path) -> None:
    """The file may change or end while the verifier still has the matrix."""
    rows, x = np.memmap(tmp_path / "w", np.float32, "w+", shape=(512, 512)), Enclosure(np.ones((1, 512)))
    rows[:] = 1
    weight = Weight("layers.0.attention.wq", rows.shape, rows.dtype, source=lambda: np.asarray(rows).T.T, origin="w")
    ops = EnclosureOps(policy("float32"))
    before = ops.linear(x, weight)
    rows[:] = 5
    np.testing.assert_array_equal(ops.linear(x, weight).mid, before.mid)


def test_values_in_memory_of_their_own_are_not_copied() -> None:
    rows = np.ones((4, 4), np.float32)
    for values in (rows, rows.reshape(2, 8).T, np.frombuffer(rows.tobytes(), np.float32)):
        assert lasting(values) is values


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("held", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_the_largest_magnitude_of_rows_may_be_known(stored: Any, held: Any) -> None:
    """Rounding makes it another one: 1 + 2^-10 is 1 in bfloat16, and 1 + 2^-24 is 1 in float32."""
    rows = np.full((300, 3), -(1 + 2.0**-10) * (1 + 2.0**-24)).astype(stored)
    found, expected = narrow.matrix_of(rows, held, 0, largest(rows)), narrow.matrix_of(rows, held, 0)
    assert isinstance(found, narrow.NarrowMatrix)
    assert isinstance(expected, narrow.NarrowMatrix)
    assert found.most == expected.most == np.abs(found.mid).max()


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("columns", [7, 600])
def test_a_product_comes_with_bounds_of_all_its_elements(columns: int, truncates: bool) -> None:
    """Half of the factors are subnormal, which widens the radius where an accumulator cuts off."""
    rng = np.random.default_rng(columns)
    x, rows = rng.standard_normal((70, 300)), rng.standard_normal((columns, 300)).astype(np.float32)
    x[:, ::2] *= FLOAT16.tiny / 8
    how = Accumulator(FLOAT32, FLOAT16, truncates=truncates)
    made = product(Enclosure(x), narrow.matrix_of(rows, FLOAT32, 0), how)
    assert (made.most is None) <= truncates
    found = (np.abs(made.mid), made.radius, made.least_variance)
    assert all((each <= most).all() for each, most in zip(found, made.most or found, strict=True))


@pytest.mark.parametrize("at", [0, CACHED // 4, CACHED // 4 + 1, -1])
@pytest.mark.parametrize("value", [-9.0, 9.0, np.nan])
def test_the_largest_magnitude_is_found_in_each_part_of_a_long_array(value: float, at: int) -> None:
    rows = np.linspace(-1, 1, CACHED // 2 + 3, dtype=np.float32)
    rows[at] = value
    np.testing.assert_equal(largest(rows), abs(value))
    weight = Weight("w", rows.shape, rows.dtype, source=lambda: rows, origin="w")
    if not math.isnan(value):
        weight.read()
        assert weight.most == 9


def test_a_narrow_matrix_answers_as_a_wide_one() -> None:
    values = np.array([[1.0, -2.0, 0.0], [2.0**-140, 3.0, 0.0]], np.float32)
    matrix, wide = narrow.matrix_of(values, FLOAT32, 0), Matrix(Enclosure(values.T))
    for name in ("mid", "size", "square", "signs"):
        np.testing.assert_array_equal(getattr(matrix, name), getattr(wide, name))
    assert matrix.below(2.0**-150) is None
    for tiny in (2.0**-126, 2.0):
        np.testing.assert_array_equal(matrix.below(tiny), wide.below(tiny))
    for format in FORMATS.values():
        assert matrix.fits(format) == wide.fits(format)


@dataclass(frozen=True)
class InPieces:
    """Rows that are read seven at a time, the last ones first."""

    values: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def each(self, use: Callable[[int, Any], None]) -> None:
        for first in reversed(range(0, len(self.values), 7)):
            use(first, self.values[first : first + 7].copy())


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("least", [0.0, 2.0**-24, 2.0**-133])
def test_a_matrix_that_is_read_in_pieces_answers_as_one_in_memory(
    stored: Any, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "LARGE", 0)
    rng = np.random.default_rng(1)
    rows = np.where(rng.random((131, 40)) < 0.1, least, rng.standard_normal((131, 40))).astype(stored)
    x, left = Enclosure(rng.standard_normal((5, 40)), np.full((5, 40), 0.1)), rng.random((5, 40))
    matrix, held = narrow.unread(InPieces(rows), FLOAT32), narrow.matrix_of(rows, FLOAT32, 0)
    assert matrix is not None
    assert isinstance(held, narrow.NarrowMatrix)
    for found, expected in (
        (matrix.times_size(left), held.times_size(left)),
        (matrix.one_way(x), held.one_way(x)),
        *((matrix.times_below(left, tiny), held.times_below(left, tiny)) for tiny in (2.0**-126, 2.0**-14, 0.3)),
        *((matrix.times_lacking(left, tiny), held.times_lacking(left, tiny)) for tiny in (2.0**-126, 2.0**-14, 0.3)),
        *zip(*(vars(each.sums(x, None).rows(slice(None))).values() for each in (matrix, held)), strict=True),
        *zip(*(vars(each.squares(x).rows(slice(None))).values() for each in (matrix, held)), strict=True),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-13)
    assert matrix.most == held.most
    for format in FORMATS.values():
        assert matrix.fits(format) == held.fits(format)


@pytest.mark.parametrize("value", [0.0, 2.0**40, np.inf, -np.inf, np.nan])
def test_a_matrix_that_is_read_in_pieces_says_where_float32_does_not_serve(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "LARGE", 0)
    rows = np.full((20, 40), value and 1.0, np.float32)
    rows[3, 3] = value
    x, asks = Enclosure(np.ones((2, 40))), (lambda m: m.sums(x, None), lambda m: m.squares(x), lambda m: m.mid)
    for ask in asks:
        with pytest.raises(narrow.NotHeld):
            ask(narrow.unread(InPieces(rows), FLOAT32))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", [1, 300, 512])
def test_terms_of_one_sign_are_counted(stored: Any, n: int) -> None:
    """Zeros of both signs, subnormal numbers, and more rows than a tile has."""
    rng = np.random.default_rng(n)
    values = np.array([0.0, -0.0, 2.0**-24, -(2.0**-24), 1.0, -1.0, 0.5])
    rows, x = rng.choice(values, (130, n)).astype(stored), rng.choice(values, (70, n))
    rows[0, 0] = 1.0
    terms = np.sign(x)[:, None] * np.sign(rows.astype(np.float64))
    np.testing.assert_array_equal(narrow.matrix_of(rows, FLOAT32, 0).one_way(Enclosure(x)), np.abs(terms.sum(-1)))


def weakened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "excess", lambda roundings: 1.0)


def no_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "FLUSHED", 0.0)


@pytest.mark.parametrize("fault", [weakened, no_losses])
def test_the_law_sees_a_bound_without_its_own_error(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of random numbers, and numbers whose squares float32 does not have."""
    fault(monkeypatch)
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((40, 300)).astype(np.float32)
    rows[:, 0] = 0
    x = rng.standard_normal((9, 300))
    if fault is no_losses:
        x = np.where(np.arange(300) == 0, 1.0, x * 2.0**-120)
    found, expected = both(Enclosure(x), rows)
    assert any((getattr(found, name) < getattr(expected, name)).any() for name in BOUNDS)


@pytest.mark.parametrize("at", [0, 141])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_number_that_is_none_is_found_anywhere(stored: Any, bad: float, at: int) -> None:
    rows = np.ones((71, 2), stored)
    rows.reshape(-1)[at] = bad
    assert not isinstance(narrow.matrix_of(rows, FLOAT32, 0), narrow.NarrowMatrix)


@pytest.mark.parametrize("stored", [format.dtype for format in FORMATS.values()])
@pytest.mark.parametrize(
    "values", [[[]], [[-0.0]], [[0.0, -3.0]], [[-1.5, -2.0]], [[2.0, 1.0]], [[1e-7, -2e-7]], [[-np.inf, 1]]]
)
def test_the_largest_magnitude_is_read_from_the_bits(stored: Any, values: Any) -> None:
    rows = np.array(values).astype(stored)
    assert largest(rows) == np.abs(rows.astype(np.float64)).max(initial=0)
