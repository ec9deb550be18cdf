# SPDX-License-Identifier: Apache-2.0
"""Formats against the casts of NumPy and ml_dtypes, bit by bit, and their own definitions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.formats import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FORMATS,
    Format,
    cell,
    nearest,
    representable,
    ulp,
)

NARROW = (BFLOAT16, FLOAT16, FLOAT32)
formats = st.sampled_from(NARROW)
bits = st.integers(0, 2**64 - 1)


def same_bits(a: Any, b: Any) -> bool:
    """Equal in every bit, but one NaN is as good as another."""
    a, b = np.float64(a), np.float64(b)
    return bool(np.isnan(a) and np.isnan(b)) or a.tobytes() == b.tobytes()


def all_values(format: Format) -> Any:
    """Every value of a 16-bit format, as binary64."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.arange(1 << 16, dtype=np.uint16).view(format.dtype).astype(np.float64)


def cast(x: Any, format: Format) -> Any:
    """The library's own cast."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.asarray(x, np.float64).astype(format.dtype).astype(np.float64)


@st.composite
def near(draw: st.DrawFn, format: Format) -> float:
    """Values that decide something: multiples of a quarter of a spacing, up to beyond the largest.

    Those of a 16-bit format are exact in float32, so a cast to bfloat16 that goes by way of float32 rounds them once.
    """
    exponent = draw(st.integers(format.exponent_min - format.precision - 3, format.exponent_max + 1))
    spacing = np.ldexp(1.0, max(exponent, format.exponent_min) - format.precision - 1)
    return float(draw(st.integers(-(2 ** (format.precision + 2)), 2 ** (format.precision + 2))) * spacing)


@given(st.data(), formats)
def test_nearest_is_the_cast_at_multiples_of_a_quarter_of_a_spacing(data: Any, format: Format) -> None:
    """Ties, subnormals, signed zeros, the edge of overflow."""
    x = data.draw(near(format))
    assert same_bits(nearest(x, format), cast(x, format)), (x, format)


@given(bits, st.sampled_from((FLOAT16, FLOAT32)))
def test_nearest_is_the_cast_for_any_bits(pattern: int, format: Format) -> None:
    """NaN and infinity too. NumPy's casts from binary64 round once."""
    x = np.uint64(pattern).view(np.float64)
    assert same_bits(nearest(x, format), cast(x, format)), x


@given(st.integers(0, 2**32 - 1))
def test_nearest_is_the_cast_from_float32_to_bfloat16(pattern: int) -> None:
    x = np.uint32(pattern).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        assert same_bits(nearest(np.float64(x), BFLOAT16), cast(x, BFLOAT16)), x


def test_every_16_bit_value_is_its_own_nearest() -> None:
    for format in (BFLOAT16, FLOAT16):
        values = all_values(format)
        assert np.array_equal(nearest(values, format), values, equal_nan=True)
        assert representable(values, format).all()


@pytest.mark.parametrize("format", NARROW, ids=str)
def test_the_numbers_of_a_format_are_those_of_its_dtype(format: Format) -> None:
    import ml_dtypes

    info = ml_dtypes.finfo(format.dtype)
    assert (format.u, format.largest, format.tiny) == (float(info.eps) / 2, float(info.max), float(info.tiny))
    assert FORMATS[str(format)] is format


@given(bits)
def test_float64_rounds_nothing(pattern: int) -> None:
    x = np.uint64(pattern).view(np.float64)
    assert same_bits(nearest(x, FLOAT64), x)
    assert representable(x, FLOAT64)


@given(st.data(), st.sampled_from((BFLOAT16, FLOAT16, FLOAT32, FLOAT64)))
def test_ulp_is_the_distance_to_the_next_value(data: Any, format: Format) -> None:
    """Away from zero, of a finite value of the format."""
    width = format.dtype.itemsize * 8
    unsigned: Any = getattr(np, f"uint{width}")
    value = unsigned(data.draw(st.integers(0, 2 ** (width - 1) - 2))).view(format.dtype)
    following = (value.view(unsigned) + unsigned(1)).view(format.dtype)
    low, high = np.float64(value), np.float64(following)
    if not np.isfinite(low):
        assert np.isposinf(ulp(low, format))
    elif np.isfinite(high):
        assert ulp(low, format) == ulp(-low, format) == high - low


def check_cells(y: Any, format: Format) -> None:
    """Just inside both ends lies the value, just outside another. An end itself goes to the even neighbour."""
    for ends, outwards in zip(cell(y, format), (-np.inf, np.inf), strict=True):
        assert (nearest(np.nextafter(ends, -outwards), format) == y).all()
        beyond, tie = nearest(np.nextafter(ends, outwards), format), nearest(ends, format)
        assert (beyond != y).all()
        assert ((tie == y) | (tie == beyond)).all()
        patterns = tie.astype(format.dtype).view(f"u{format.dtype.itemsize}")
        assert (patterns % 2 == 0).all()  # an infinity counts as even


@pytest.mark.parametrize("format", [BFLOAT16, FLOAT16], ids=str)
def test_a_cell_is_what_rounds_to_its_value(format: Format) -> None:
    """Every finite 16-bit value."""
    values = all_values(format)
    check_cells(values[np.isfinite(values)], format)


@given(st.data(), st.integers(-149, 127), st.sampled_from([-1, 1]))
def test_a_cell_of_float32_is_what_rounds_to_its_value(data: Any, exponent: int, sign: int) -> None:
    """Any value, and any power of two."""
    y = nearest(data.draw(near(FLOAT32)), FLOAT32)
    powers = sign * np.ldexp(1.0, [exponent])
    check_cells(np.append(powers, y[np.isfinite(y)]), FLOAT32)


@given(st.data(), formats)
def test_representable_is_what_rounding_leaves_alone(data: Any, format: Format) -> None:
    x = data.draw(near(format))
    assert representable(x, format) == (cast(x, format) == x)


def test_what_holds_what() -> None:
    """A dtype holds another when no value of that changes in it."""
    for outer, inner in itertools.product(FORMATS.values(), repeat=2):
        if inner.precision < 20:
            assert outer.holds(inner) == bool(representable(all_values(inner), outer).all()), (outer, inner)
        else:
            assert outer.holds(inner) == (outer.precision >= inner.precision)
