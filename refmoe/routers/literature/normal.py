# SPDX-License-Identifier: Apache-2.0
"""Softplus and the normal distribution function, from the operations that every `ops` has."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps

NEAR = 2.5
"""Up to here the series is used, beyond it the continued fraction."""
FAR = 40.0
"""Beyond this number the upper tail is below every float64: exp(-800) is 0."""
TERMS = 48
"""At 2.5 the first omitted term, 2.5^97 / (1 * 3 * ... * 97), is below 2^-60 of the sum."""
LEVELS = 60
"""At 2.5 the error of the fraction is about exp(-2 * 2.5 * sqrt(120)), below 2^-60."""
INVERSE_ROOT_TWO_PI = 0.3989422804014327


def softplus(ops: ArrayOps, x: Array) -> Array:
    """log(1 + exp(x)), to a few ulp for every x.

    It is max(x, 0) + log(1 + e) with e = exp(-|x|). 1 + e rounds to u; log(u) * e / (u - 1) corrects that rounding
    (Kahan), and where u is 1, log(1 + e) is e.
    """
    e = ops.exp(ops.where(x > 0, -x, x))
    u = e + 1
    rounded_away = u == 1
    step = ops.where(u > 1, u - 1, 1.0)
    return ops.where(x > 0, x, 0.0) + ops.where(rounded_away, e, ops.log(u) * (e / step))


def normal_cdf(ops: ArrayOps, x: Array) -> Array:
    """The probability that a standard normal number is below x, in float64 or float32.

    With a = |x| and density phi: up to 2.5, 1/2 +- phi(a) * (a + a^3/3 + a^5/(3*5) + ...), all terms positive; beyond,
    the upper tail phi(a) / (a + 1/(a + 2/(a + 3/(a + ...)))). Both are truncated with an error below the rounding of
    float64, so the result in ball arithmetic is no enclosure.

    Abramowitz and Stegun 1964, 26.2.11 and 26.2.14.
    """
    a = ops.where(x < 0, -x, x)
    a = ops.where(a < FAR, a, FAR)
    near = ops.where(a < NEAR, a, NEAR)
    term = series = near
    for n in range(1, TERMS):
        term = term * (near * near) / (2 * n + 1)
        series = series + term
    far = ops.where(a > NEAR, a, NEAR)
    fraction = far
    for n in range(LEVELS, 0, -1):
        fraction = far + n / fraction
    density = ops.exp(a * a / -2) * INVERSE_ROOT_TWO_PI
    upper = ops.where(a > NEAR, density / fraction, 0.5 - density * series)
    return ops.where(x < 0, upper, 1 - upper)
