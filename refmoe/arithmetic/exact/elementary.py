# SPDX-License-Identifier: Apache-2.0
"""exp, log, sin, cos and sigmoid in float64, with the same bits on every machine.

NumPy's own functions differ in bits between SIMD levels, and from CUDA's. The functions here use only IEEE-754 binary64
`+ - * /` in round to nearest even, rint, comparisons, selections, table look-ups and integer operations on the bits.
They apply one array operation at a time and never fuse two. So every machine and array module that keeps IEEE-754
returns the same bits, whatever the shape, the strides and the position in the array.

The error is below 0.51 ulp, subnormal results included: `bench/elementary_accuracy.py` measures it against Arb, at ten
million arguments per function. `golden/elementary.md` states the algorithms for other languages, with code in C.

Every function takes arrays of any shape (0-d included) of dtype float64, and no other, and `xp`, the array module:
numpy or cupy. No function raises for an element or warns. Outside the domain the result is always the NaN
0x7ff8000000000000, whatever the sign and payload of the argument.

Method: Tang 1989 and 1990, "Table-driven implementation of the exponential (logarithm) function in IEEE floating-point
arithmetic". A small table brings the argument near a centre. The table's leading parts have 26 bits, so that their
products with the leading 26 bits of the reduced argument are exact. The other terms are so small that their roundings
move the result by less than 0.01 ulp. A last addition rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.exact import double_double
from refmoe.arithmetic.exact import elementary_tables as tables
from refmoe.arithmetic.exact.double_double import fast_two_sum, power_of_two, split, two_product, two_sum

_EXP_LARGEST = float.fromhex("0x1.62e42fefa39efp+9")  # the largest x whose e^x does not round to infinity
_EXP_SMALLEST = -800.0  # far below -745.13, from which on e^x rounds to zero

# up to this magnitude of x no number below is subnormal if the table of exp is multiplied by 2^k: the same bits
_ORDINARY = 128.0

# (r + _GRID_31) - _GRID_31 rounds |r| < 2^20 to a multiple of 2^-31
_GRID_31 = float.fromhex("0x1.8p+21")
_LARGEST_ANGLE = 1073741824.0  # 2^30
_ZERO = np.asarray(0.0)

# elements that NumPy works on at a time, so that the intermediate results stay in the cache
_BLOCK = 4096


def exp(x: Array, xp: Any = np) -> Array:
    """e^x. Domain: all; +inf above 709.78, +0 below -745.13, subnormal results rounded once."""
    return _by_blocks(_exp, xp, x)[0]


def log(x: Array, xp: Any = np) -> Array:
    """The natural logarithm. Domain: x >= 0, subnormal included; -inf for +-0, NaN for x < 0."""
    return _by_blocks(_log, xp, x)[0]


def sin_cos(x: Array, xp: Any = np) -> tuple[Array, Array]:
    """(sin x, cos x) for x in radians. Domain: |x| <= 2^30; NaN outside it. sin(-0) is -0."""
    sin, cos = _by_blocks(_sin_cos, xp, x, outputs=2)
    return sin, cos


def sigmoid(x: Array, xp: Any = np) -> Array:
    """1 / (1 + e^-x). Domain: all."""
    return _by_blocks(_sigmoid, xp, x)[0]


def unit_circle(positions: Array, base: float, numerators: Any, denominator: int, xp: Any = np) -> tuple[Array, Array]:
    """(cos a, sin a) of the real numbers a[t, i] = positions[t] * base^(-numerators[i] / denominator).

    No intermediate value is rounded to float64: frequency, product and reduction carry about 100 bits. So the error is
    below 0.51 ulp + 2^-60 max(1, 1/base) at every position.

    positions: [T] integers, 0 .. 2^31; NaN outside.   base: 2^-8 .. 2^512.   denominator: 1 .. 2^31.
    numerators: [n] integers, 0 .. denominator.   returns: two of [T, n] float64.
    Rotary embedding: base is theta, numerators are 0, 2, 4, ..., denominator is head_dim.
    """
    top = tuple(np.asarray(numerators, dtype=np.int64).reshape(-1).tolist())
    if not 2.0**-8 <= base <= 2.0**512:
        raise ValueError(f"unit_circle takes a base in 2^-8 .. 2^512, not {base}")
    if not 1 <= denominator <= 2**31 or any(not 0 <= numerator <= denominator for numerator in top):
        raise ValueError(f"unit_circle takes exponents -n / {denominator} with 0 <= n <= {denominator} <= 2^31")
    high, low = _steps_per_position(float(base), top, denominator)
    high, low = xp.asarray(high)[None, :], xp.asarray(low)[None, :]
    rows = xp.asarray(positions)
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise TypeError(f"positions are integers in one dimension, not {rows.dtype} of shape {rows.shape}")
    rows = rows.astype(np.int64)
    rows = xp.where((rows >= 0) & (rows <= 2**31), rows, -1).astype(np.float64)[:, None]
    cos, sin = xp.empty((2, rows.shape[0], high.shape[1]))
    height = max(1, _BLOCK // max(1, high.shape[1])) if xp is np else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], height):
        block = slice(start, start + height)
        position = rows[block]
        steps, error = two_product(position, high)  # the angle in units of pi / 32: the reduction is exact
        nearest = xp.rint(steps)
        rest = two_sum(steps - nearest, error + position * low)
        sine, cosine = _near_step(nearest, double_double.multiply(rest, tables.PI_STEP), xp)
        sin[block] = xp.where(position < 0.0, np.nan, sine)
        cos[block] = xp.where(position < 0.0, np.nan, cosine)
    return cos, sin


@lru_cache(maxsize=64)
def _steps_per_position(base: float, numerators: tuple[int, ...], denominator: int) -> double_double.Pair:
    """base^(-numerator / denominator) in units of pi / 32, a double-double of [n] each, computed once on the host."""
    theta, top = np.array([base]), np.array(numerators, dtype=np.float64)
    exponent = double_double.multiply(double_double.log(theta, near=log(theta)), (0.0 - top, 0.0))
    frequency = double_double.exp(double_double.divide(exponent, float(denominator)))
    high, low = double_double.multiply(frequency, (tables.STEPS_PER_PI, tables.STEPS_PER_PI_LOW))
    high.flags.writeable = low.flags.writeable = False
    return high, low


def _by_blocks(kernel: Callable[[Array, Any], tuple[Array, ...]], xp: Any, x: Array, outputs: int = 1) -> list[Array]:
    """Apply an elementwise kernel to an array of any shape and strides."""
    x = xp.asarray(x)
    if x.dtype != np.float64:
        raise TypeError(f"float64 is wanted here, not {x.dtype}: convert it first, so that the conversion is seen")
    if x.ndim and 0 < x.size <= _BLOCK:
        return list(kernel(x, xp))
    flat = x.reshape(-1)
    results = [xp.empty_like(flat) for _ in range(outputs)]
    size = _BLOCK if xp is np else max(1, flat.size)
    for start in range(0, flat.size, size):
        block = slice(start, start + size)
        for result, part in zip(results, kernel(flat[block], xp), strict=True):
            result[block] = part
    return [result.reshape(x.shape) for result in results]


class _Numbers:
    """Numbers to compute with: for NumPy arrays of no dimension, as an operation takes a third less time with these."""

    def __init__(self, *values: float) -> None:
        self.values, self.arrays = values, tuple(map(np.asarray, values))

    def of(self, xp: Any) -> tuple[Any, ...]:
        return self.arrays if xp is np else self.values


def _is_ordinary(x: Array) -> bool:
    """Whether no element of an array of NumPy is above `_ORDINARY` in magnitude, or NaN."""
    # in a fourth of the time of min and max
    return bool(x.item(x.argmin()) >= -_ORDINARY and x.item(x.argmax()) <= _ORDINARY)


def _polynomial(x: Array, first: float, *rest: float) -> Array:
    """Horner's rule, the coefficient of the highest power first; every coefficient is a rounded quotient."""
    y = x * first
    for position, coefficient in enumerate(rest):
        if position > 0:
            y *= x
        y += coefficient
    return y


_EXP_NUMBERS = _Numbers(tables.STEPS_PER_LN2, tables.LN2_STEP_1, tables.LN2_STEP_2, _GRID_31)
_EXP_SERIES = _Numbers(1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)


def _exp_reduced(x: Array, xp: Any) -> tuple[Array, Array, Array]:
    """x = n ln 2 / 16 + r for |x| <= 800: n in int64, the leading 26 bits r1 of r, and e^r - 1 - r1."""
    steps_per_ln2, step_1, step_2, grid = _EXP_NUMBERS.of(xp)
    n = xp.rint(x * steps_per_ln2)
    r = x - n * step_1  # exact
    tail = n * step_2
    r1 = r + grid
    r1 -= grid
    r2 = r - r1
    r2 -= tail
    r -= tail
    q = _polynomial(r, *_EXP_SERIES.of(xp))
    q *= r * r  # e^r - 1 - r
    r2 += q
    return n.astype(np.int64), r1, r2


def _near_entry(t1: Array, t2: Array, r1: Array, r2: Array) -> double_double.Pair:
    """(t1 + t2) (1 + r1 + r2) with a relative error near 2^-63. Overwrites r1 and r2."""
    high, error = fast_two_sum(t1, t1 * r1)  # the product is exact
    r1 *= t2
    r2 *= t1 + t2
    r2 += r1
    r2 += t2
    r2 += error  # error + (t2 + (t2 r1 + (t1 + t2) r2))
    return high, r2


def _exp_parts(x: Array, xp: Any) -> tuple[Array, Array, Array]:
    """e^x = (high + low) 2^k for -800 <= x <= 710, with high in (0.97, 2), |low| < 2^-11, and 16 k in int64."""
    n, r1, r2 = _exp_reduced(x, xp)
    j = n & 15
    t1, t2 = xp.asarray(tables.EXP_TABLE[0])[j], xp.asarray(tables.EXP_TABLE[1])[j]
    return *_near_entry(t1, t2, r1, r2), n - j


def _scaled_table(most: int) -> Array:
    """The table of exp beyond its entries, by exact scaling: 2^(n/16), n = 0 .. most, -most .. -1: [2, 2 most + 1]"""
    n = np.array([*range(most + 1), *range(-most, 0)])
    scaled: Array = tables.EXP_TABLE[:, n & 15] * power_of_two(n >> 4)
    return scaled


_SCALED_TABLE = tuple(_scaled_table(int(_ORDINARY * tables.STEPS_PER_LN2) + 1))


def _ordinary_exp(x: Array) -> double_double.Pair:
    """e^x = high + low, in NumPy: all of `_exp_parts`, in fewer operations."""
    n, r1, r2 = _exp_reduced(x, np)
    t1, t2 = _SCALED_TABLE
    return _near_entry(t1[n], t2[n], r1, r2)


def _round_scaled(high: Array, low: Array, k: Array, xp: Any) -> Array:
    """(high + low) 2^k, rounded once, for high >= 0 and a result that does not overflow.

    Where the result is subnormal, 2^(-1022-k) is added and subtracted: the sum rounds at the last bit of a subnormal.
    """
    anchor = (xp.maximum(1 - k, 0) << 52).view(np.float64)
    anchor = xp.where(high + low < anchor, anchor, 0.0)
    rounded, error = fast_two_sum(anchor, high)
    rounded = (rounded + (error + low)) - anchor
    half = k >> 1  # in two steps, as 2^k itself may overflow or be subnormal
    return (rounded * power_of_two(half)) * power_of_two(k - half)


def _exp(x: Array, xp: Any) -> tuple[Array]:
    if xp is np and _is_ordinary(x):
        high, low = _ordinary_exp(x)
        high += low
        return (high,)
    inside = (x >= _EXP_SMALLEST) & (x <= _EXP_LARGEST)
    high, low, shift = _exp_parts(xp.where(inside, x, 0.0), xp)
    y = _round_scaled(high, low, shift >> 4, xp)
    return (xp.where(inside, y, xp.where(x > 0.0, np.inf, xp.where(x < 0.0, 0.0, np.nan))),)


def _logistic_parts(x: Array, xp: Any) -> tuple[Array, Array, Array]:
    """1 / (1 + e^-x) = (high + low) 2^k for every x but NaN."""
    negative = x < 0.0
    e1, e2, k = _exp_parts(xp.maximum(-xp.abs(x), _EXP_SMALLEST), xp)  # of -|x|
    k >>= 4
    scale = power_of_two(xp.maximum(k, -200))  # below 2^-200 the sum is 1 in any case
    high, low = _quotient(xp.where(negative, e1, 1.0), xp.where(negative, e2, 0.0), e1 * scale, e2 * scale, xp)
    return high, low, xp.where(negative, k, 0)


_ONE = _Numbers(1.0)


def _quotient(n1: Array, n2: Array, e1: Array, e2: Array, xp: Any) -> double_double.Pair:
    """(n1 + n2) / (1 + e1 + e2)"""
    (one,) = _ONE.of(xp)
    d1, d2 = fast_two_sum(one, e1)
    d2 += e2
    high = n1 / d1
    low = double_double.remainder(n1, high, d1)
    low += n2 - high * d2
    low /= d1 + d2
    return high, low


def _sigmoid(x: Array, xp: Any) -> tuple[Array]:
    if xp is np and _is_ordinary(x):
        e1, e2 = _ordinary_exp(-xp.abs(x))
        one = (x >= _ZERO).astype(np.float64)  # where 1 is divided, else 0; a choice of elements takes twice the time
        high, low = _quotient(xp.maximum(e1, one), e2 - e2 * one, e1, e2, xp)
        high += low
        return (high,)
    number = x == x
    y = _round_scaled(*_logistic_parts(xp.where(number, x, 0.0), xp), xp)
    return (xp.where(number, y, np.nan),)


def _log(x: Array, xp: Any) -> tuple[Array]:
    inside = (x > 0.0) & (x < np.inf)
    safe = xp.where(inside, x, 1.0)
    lift = (safe < 2.0**-1022).astype(np.int64) * 54  # makes a subnormal number normal
    bits = (safe * power_of_two(lift)).view(np.int64)
    k = (bits - tables.SQRT_HALF_BITS) >> 52
    m = (bits - (k << 52)).view(np.float64)  # x = m 2^(k - lift), sqrt(1/2) <= m < sqrt(2)
    k = (k - lift).astype(np.float64)
    i = xp.rint(32.0 / m)
    m1, m2 = split(m)
    r = ((m1 * i - 32.0) + m2 * i) * 2.0**-5  # m i / 32 - 1, exact
    r1, r2 = split(r)
    square = r1 * r1 * 0.5  # exact; r^2 / 2 = square + r2 (r + r1) / 2
    q = _polynomial(r, 1 / 11, -1 / 10, 1 / 9, -1 / 8, 1 / 7, -1 / 6, 1 / 5, -1 / 4, 1 / 3)
    q = (q * r) * (r * r) - (r2 * (r + r1)) * 0.5
    j = i.astype(np.int64) - 23
    centre = k * tables.LN2_1 + xp.asarray(tables.LOG_TABLE[0])[j]  # exact
    rest = k * tables.LN2_2 + xp.asarray(tables.LOG_TABLE[1])[j]
    near, error = fast_two_sum(r, -square)
    high, more = fast_two_sum(centre, near)
    y = high + (more + (error + (rest + q)))
    return (xp.where(inside, y, xp.where(x == 0.0, -np.inf, xp.where(x > 0.0, np.inf, np.nan))),)


def _sin_cos(x: Array, xp: Any) -> tuple[Array, Array]:
    size = xp.abs(x)
    inside = size <= _LARGEST_ANGLE
    small = size < 2.0**-27  # sin x = x and cos x = 1 to within 2^-55
    safe = xp.where(inside & ~small, x, 0.0)
    n = xp.rint(safe * tables.STEPS_PER_PI)
    p1, p2, p3, p4, p5, p6 = tables.PI_STEP_PARTS
    r = (safe - n * p1) - n * p2  # exact, as are the next three products; then |r| < 0.06
    r, e3 = two_sum(r, -(n * p3))
    r, e4 = two_sum(r, -(n * p4))
    r, e5 = two_sum(r, -(n * p5))
    sin, cos = _near_step(n, fast_two_sum(r, ((e3 + e4) + e5) - n * p6), xp)
    sin, cos = xp.where(small, x, sin), xp.where(small, 1.0, cos)
    return xp.where(inside, sin, np.nan), xp.where(inside, cos, np.nan)


def _near_step(n: Array, r: double_double.Pair, xp: Any) -> tuple[Array, Array]:
    """(sin, cos) of n pi / 32 + r, for integers n below 2^53 in float64 and a double-double |r| < 0.05."""
    r0, low = r
    r1, r2 = split(r0)
    r2 = r2 + low
    z = r0 * r0
    s = _polynomial(z, 1 / 362880, -1 / 5040, 1 / 120, -1 / 6) * (z * r0)  # sin r - r
    c = _polynomial(z, 1 / 40320, -1 / 720, 1 / 24, -1 / 2) * z  # cos r - 1
    j = n.astype(np.int64) & 63
    leading, remainder = xp.asarray(tables.SIN_TABLE[0]), xp.asarray(tables.SIN_TABLE[1])
    sin1, sin2 = leading[j], remainder[j]
    j = (j + 16) & 63
    cos1, cos2 = leading[j], remainder[j]
    sin0, cos0 = sin1 + sin2, cos1 + cos2
    high, error = fast_two_sum(sin1, cos1 * r1)  # the product is exact
    sin = high + (error + (sin2 + ((cos1 * r2 + cos2 * r0) + (sin0 * c + cos0 * s))))
    high, error = fast_two_sum(cos1, -(sin1 * r1))
    cos = high + (error + (cos2 + ((cos0 * c - sin0 * s) - (sin1 * r2 + sin2 * r0))))
    return sin, cos
