# SPDX-License-Identifier: Apache-2.0
"""Binary floating-point formats: spacing, rounding to nearest, and which reals round to a value.

Everything computes in binary64, which holds every value and every midpoint of the narrower formats exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Format:
    """An IEEE-754 binary format: `precision` bits of significand, the leading one counted."""

    name: str
    precision: int
    exponent_min: int
    exponent_max: int

    @property
    def u(self) -> float:
        """The unit roundoff: the largest relative error of rounding to nearest in the normal range."""
        return float(2.0**-self.precision)

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float((2 - 2.0 ** (1 - self.precision)) * 2.0**self.exponent_max)

    @property
    def tiny(self) -> float:
        """The smallest normal value."""
        return float(2.0**self.exponent_min)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's dtype of this name."""
        return np.dtype(ml_dtypes.bfloat16 if self.name == "bfloat16" else self.name)

    def holds(self, other: Format) -> bool:
        """Whether this format has every value of the other one. The largest exponent determines the smallest."""
        return other.precision <= self.precision and other.exponent_max <= self.exponent_max

    def __str__(self) -> str:
        return self.name


BFLOAT16 = Format("bfloat16", 8, -126, 127)
FLOAT16 = Format("float16", 11, -14, 15)
FLOAT32 = Format("float32", 24, -126, 127)
FLOAT64 = Format("float64", 53, -1022, 1023)
FORMATS = {format.name: format for format in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)}
OF_DTYPE = {format.dtype: format for format in FORMATS.values()}
"""From NumPy's dtype to the format of its values."""


CACHED = 1 << 18
"""Bytes that are looked at together: a second-level cache holds them."""
_EXPONENT = np.int64(0x7FF0000000000000)
"""The bits of a binary64 that hold its exponent."""
_SIGNIFICAND = np.int64(0x000FFFFFFFFFFFFF)
"""The bits of a binary64 that hold its significand, without the leading one. A power of two has none of them."""


def upcast(stored: Any, dtype: np.dtype[Any]) -> Any:
    """Stored values at the computing dtype: exact, as each stored dtype is a subset of float32."""
    if stored.dtype == dtype:
        return stored
    if stored.dtype == ml_dtypes.bfloat16:
        # a bfloat16 is the upper half of a float32: a shift is several times faster than a cast
        wide = stored.view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        stored = wide.view(np.float32)
    return stored.astype(dtype, copy=False)


def largest(stored: Any) -> float:
    """The largest magnitude of an array of floats, 0 if it is empty, NaN if one is NaN.   stored: a dtype of `OF_DTYPE`

    Without their sign, the bits of such values have the order of the values, with NaN above infinity. To compare bits
    is several times faster than to compare numbers of 16 bits.
    """
    bits = stored.view(f"i{stored.itemsize}")
    most, above, below = np.iinfo(bits.dtype).max, 0, 0
    for part in _in_cache(bits):
        above = max(above, int(part.max(initial=0)))
        below = max(below, int(part.view(f"u{stored.itemsize}").max(initial=0)) & most)
    return float(np.array(max(above, below), bits.dtype).view(stored.dtype))


def _in_cache(array: Any) -> Iterator[Any]:
    """An array in parts that the cache holds, so that two looks at a part read the memory once."""
    if array.nbytes <= CACHED or not array.flags.c_contiguous:
        yield array
        return
    flat, step = array.reshape(-1), CACHED // array.itemsize
    yield from (flat[start : start + step] for start in range(0, len(flat), step))


def ulp(x: Any, format: Format) -> Floats:
    """The spacing of the format's values at |x|, as if there were no largest value; infinite where x is not finite."""
    x = np.asarray(x, np.float64)
    # the exponent's bits alone are 2^floor(log2 |x|): 0 where x is subnormal, infinity where it is not finite
    spacing: Floats = np.asarray(x.view(np.int64) & _EXPONENT).view(np.float64)
    np.maximum(spacing, format.tiny, out=spacing)
    spacing *= 2.0 ** (1 - format.precision)
    return spacing


def nearest(x: Any, format: Format) -> Floats:
    """Round to the nearest value of the format, ties to even, beyond the largest to infinity."""
    x = np.asarray(x, np.float64)
    if format == FLOAT64:
        return np.array(x)
    if format == FLOAT32:
        with np.errstate(all="ignore"):
            narrow: Floats = x.astype(np.float32).astype(np.float64)
        return narrow
    finite = np.isfinite(x)
    known = x if finite.all() else np.where(finite, x, 0.0)
    spacing = ulp(known, format)
    rounded: Floats = np.rint(known / spacing) * spacing
    over = np.abs(rounded) > format.largest
    if over.any():
        rounded = np.where(over, np.copysign(np.inf, known), rounded)
    return rounded if known is x else np.where(finite, rounded, x)


def representable(x: Any, format: Format) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of the values the format can hold. It can hold NaN."""
    x = np.asarray(x, np.float64)
    held: np.ndarray[Any, np.dtype[np.bool_]]
    if format.precision >= FLOAT32.precision:
        held = (nearest(x, format) == x) | np.isnan(x)
    else:
        with np.errstate(invalid="ignore"):
            steps = x / ulp(x, format)
        held = ((np.rint(steps) == steps) & (np.abs(x) <= format.largest)) | ~np.isfinite(x)
    return held


def cell(y: Any, format: Format) -> tuple[Floats, Floats]:
    """The cell of each finite value `y` of the format: the two ends of the real numbers that round to it.

    Real numbers between the ends round to `y`. The ends themselves are ties, which round to the even neighbour. Below
    a power of two the spacing is half the spacing above it.
    """
    if format == FLOAT64:
        return y, y
    size, sign = np.abs(y), np.copysign(1.0, y)
    half = ulp(size, format) / 2
    power = ((size.view(np.int64) & _SIGNIFICAND) == 0) & (size > format.tiny)
    inner, outer = (size - half * (1 - 0.5 * power)) * sign, (size + half) * sign
    return np.minimum(inner, outer), np.maximum(inner, outer)
