# SPDX-License-Identifier: Apache-2.0
"""Numbers of about 106 bits as unevaluated sums of two float64: error-free transforms, `+ * /`, exp and log.

A double-double is a pair (hi, lo) of float64 arrays with |lo| <= ulp(hi) / 2; its value is hi + lo. Only `+ - * /`,
rint and exact scaling by powers of two are used, one array operation at a time and never a fused multiply-add. So the
bits are the same on every machine with IEEE-754 binary64 arithmetic in round to nearest even.

Sources: Dekker 1971 (split, two_product, fast_two_sum); Knuth, TAOCP 2, 4.2.2 (two_sum); Joldes, Muller and Popescu
2017, "Tight and rigorous error bounds for basic building blocks of double-word arithmetic" (add, multiply, divide).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from refmoe.arithmetic.arrays import Array

Pair: TypeAlias = tuple[Array, Array]
"""A double-double: the rounded value and the rounding error."""

_SPLITTER = float.fromhex("0x1.0000002p+27")  # 2^27 + 1
_LN2_INVERSE = float.fromhex("0x1.71547652b82fep+0")
# ln 2 in three parts; the first two have at most 42 bits, so that their products with an integer below 2^11 are exact.
_LN2_1 = float.fromhex("0x1.62e42fefa38p-1")
_LN2_2 = float.fromhex("0x1.ef35793c76p-45")
_LN2_3 = float.fromhex("0x1.cc01f97b57a08p-87")


def two_sum(a: Array, b: Array) -> Pair:
    """s = a + b rounded, and the error: s + error == a + b exactly. Any order of magnitudes. No overflow."""
    s = a + b
    b_seen = s - a
    return s, (a - (s - b_seen)) + (b - b_seen)


def fast_two_sum(a: Array, b: Array) -> Pair:
    """As two_sum, in three operations; exact where the exponent of `a` is not below that of `b`, or a == 0."""
    s = a + b
    return s, b - (s - a)


def split(a: Array) -> Pair:
    """a == high + low exactly, each of at most 26 bits, so that products of halves are exact. |a| < 2^996."""
    c = _SPLITTER * a
    high = c - (c - a)
    return high, a - high


def two_product(a: Array, b: Array) -> Pair:
    """p = a * b rounded, and the error: p + error == a * b exactly.

    |a|, |b| < 2^996; |a b| is zero or at least 2^-969, so that no part of the error underflows.
    """
    p = a * b
    a_high, a_low = split(a)
    b_high, b_low = split(b)
    error = a_high * b_high
    error -= p
    error += a_high * b_low
    error += a_low * b_high
    error += a_low * b_low
    return p, error


def remainder(a: Array, quotient: Array, b: Array) -> Array:
    """a - quotient * b exactly, for the rounded quotient a / b. The ranges of `two_product`.

    With q and b in [1, 2), the four differences are multiples of 2^-52, 2^-77, 2^-77 and 2^-104. They are below 2^-23,
    2^-24, 2^-50 and 2^-52, as each is the sum of the products that are still to come and of the remainder.
    """
    q_high, q_low = split(quotient)
    b_high, b_low = split(b)
    rest: Array = a - q_high * b_high
    rest -= q_high * b_low
    rest -= q_low * b_high
    rest -= q_low * b_low
    return rest


def add(x: Pair, y: Pair) -> Pair:
    """x + y with relative error below 2^-104 (AccurateDWPlusDW, where no cancellation; else of the larger operand)."""
    s, error = two_sum(x[0], y[0])
    t, tail = two_sum(x[1], y[1])
    s, error = fast_two_sum(s, error + t)
    return fast_two_sum(s, error + tail)


def multiply(x: Pair, y: Pair) -> Pair:
    """x * y with relative error below 2^-103 (DWTimesDW1)."""
    p, error = two_product(x[0], y[0])
    return fast_two_sum(p, error + (x[0] * y[1] + x[1] * y[0]))


def divide(x: Pair, y: Array) -> Pair:
    """x / y for a float64 divisor, with relative error below 2^-103 (DWDivFP)."""
    quotient = x[0] / y
    return fast_two_sum(quotient, (remainder(x[0], quotient, y) + x[1]) / y)


def power_of_two(k: Array) -> Array:
    """2^k for int64 k in -1022 .. 1023, exactly: k becomes the exponent field of a float64."""
    return ((k + 1023) << 52).view(np.float64)


def exp(x: Pair) -> Pair:
    """e^x with relative error below 2^-96, for |x| <= 600. NumPy arrays of at least one dimension.

    x = k ln 2 + 16 r with |r| <= ln 2 / 32; m = e^r - 1 by Horner's rule on the Taylor series,
    r (1 + r/2 (1 + r/3 (1 + ...))) to r^16; four times e^2r - 1 = 2 m + m^2; and 2^k (1 + m).
    """
    k = np.rint(x[0] * _LN2_INVERSE)
    high, low = fast_two_sum(k * _LN2_1, k * _LN2_2)
    r = add(x, (-high, -(low + k * _LN2_3)))
    r = (r[0] * 0.0625, r[1] * 0.0625)
    one = (np.ones_like(k), np.zeros_like(k))
    series = one
    for n in range(16, 1, -1):
        series = add(one, divide(multiply(r, series), float(n)))
    m = multiply(r, series)
    for _ in range(4):
        m = add((2.0 * m[0], 2.0 * m[1]), multiply(m, m))
    high, low = add(one, m)
    scale = power_of_two(k.astype(np.int64))
    return high * scale, low * scale


def log(x: Array, near: Array) -> Pair:
    """The natural logarithm with error below 2^-94 (1 + |log x|), for 2^-512 <= x <= 2^512.

    near: log x to float64. Newton's step from it: log x = near + log(1 + d) with d = x e^-near - 1. As |d| is of the
    order of 2^-46 at most, d - d^2 / 2 is enough for log(1 + d).
    """
    zero = np.zeros_like(near)
    d = add(multiply((x, zero), exp((-near, zero))), (zero - 1.0, zero))
    return add((near, zero), add(d, (-0.5 * (d[0] * d[0]), zero)))
