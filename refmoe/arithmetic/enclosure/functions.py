# SPDX-License-Identifier: Apache-2.0
"""The rules of exp, sigmoid, softmax and the rotary angles. They use the error budgets of library functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, SLACK, UNDERFLOW, Enclosure, bounded, quiet, unbounded_beyond
from refmoe.arithmetic.enclosure.budgets import Budget, Budgets
from refmoe.arithmetic.formats import Format, ulp

EXP_REACH = 700.0
"""The largest argument for which the budget of exp matters. Beyond it exp is out of the range of every format."""

RSQRT = 3
"""Additional roundings of an inverse square root, beyond those of root and quotient: CUDA's rsqrtf errs by 2 ulp, which
is 4 roundings."""

TAIL = 8.0
"""Standard deviations of a normal error up to which its exp stays within as many standard deviations."""


def relative_error(budget: Budget, format: Format, x: Any) -> Any:
    """The relative error that the budget allows at argument x."""
    return format.u * (budget.constant + budget.slope * np.abs(x))


@quiet
def exp(x: Enclosure, values: Any, budgets: Budgets) -> Enclosure:
    """The enclosure of exp(x).   values: exp(x.mid)"""
    x = x.settle()
    budget = relative_error(budgets.exp, budgets.statistics, np.minimum(np.abs(x.mid) + x.r, EXP_REACH))
    radius = values * np.expm1(x.r + budget + 4 * OWN) + budgets.statistics.tiny
    variance = values**2 * (x.v + budget**2 / 3) + budgets.statistics.tiny**2 / 3
    return Enclosure(values, bounded(radius * SLACK), bounded(variance), accumulation=x.accumulation, owed=True)


@quiet
def sqrt(x: Enclosure) -> Enclosure:
    """The enclosure of sqrt(x), for x from zero up. It also holds for a multiplication by the inverse of the root."""
    x = x.settle()
    mid = np.sqrt(x.mid)
    moved = np.where(x.mid > 0, x.r / (mid + np.sqrt(np.maximum(x.mid - x.r, 0.0))), np.sqrt(x.r))
    inverse = RSQRT * x.accumulation.u
    radius = moved + inverse * (mid + moved) + OWN * mid
    # the spread is v / 4 m to first order, and |sqrt(m') - sqrt(m)|^2 <= |m' - m| however small m is
    variance = np.where(x.mid > 0, np.minimum(x.v / (4 * x.mid), np.sqrt(x.v)), np.sqrt(x.v)) + (inverse * mid) ** 2 / 3
    return Enclosure(mid, bounded(radius * SLACK), bounded(variance), accumulation=x.accumulation, owed=True)


def _sigmoid_error(size: Any, budgets: Budgets) -> Any:
    """The relative error of a sigmoid at arguments up to `size`: of exp, of 1 + exp(-x) and of its inverse."""
    error = relative_error(budgets.exp, budgets.accumulation, np.minimum(size, EXP_REACH)) + 2 * budgets.accumulation.u
    return error * (1 + error)


def _sigmoid_lost(budgets: Budgets) -> Any:
    """The absolute error of a sigmoid however small it is: the smallest normal value, or the budget at 1."""
    if budgets.sigmoid == "absolute":
        return budgets.accumulation.tiny + relative_error(budgets.exp, budgets.accumulation, 0.0)
    return budgets.accumulation.tiny


@quiet
def sigmoid(x: Enclosure, values: Any, budgets: Budgets) -> Enclosure:
    """The enclosure of sigmoid(x).   values: sigmoid(x.mid)

    The derivative is s (1 - s) <= 1/4, and changes by less than a tenth per unit of x.
    """
    x = x.settle()
    size = np.abs(x.mid)
    slope = values * (1 - values)
    moved = np.minimum(slope + 2 * OWN + 0.05 * x.r, 0.25) * x.r
    reach = np.minimum(values + moved, 1.0)
    # exp(-x) overflows only if the result is below the smallest normal value
    lost = _sigmoid_lost(budgets)
    radius = moved + _sigmoid_error(size + x.r, budgets) * reach + lost + 4 * OWN * values
    variance = slope**2 * x.v + (_sigmoid_error(size, budgets) * values) ** 2 / 3
    variance = variance + lost**2 / 3
    return Enclosure(values, bounded(radius * SLACK), bounded(variance), accumulation=x.accumulation, owed=True)


@quiet
def silu(x: Enclosure, values: Any, budgets: Budgets, stored: Format) -> Enclosure:
    """The enclosure of x * sigmoid(x), before its last rounding.   values: sigmoid(x.mid)

    It is treated as one function of x, since its factors are not independent: |silu'| <= 1.1 and |silu''| <= 1/2.
    stored: the dtype of the sigmoid, if that is a value of its own
    """
    x = x.settle()
    size = np.abs(x.mid)
    mid = x.mid * values
    error = _sigmoid_error(size, budgets)
    radius, variance = 4 * OWN * np.abs(mid), (error * mid) ** 2 / 3
    if x.radius is None and x.variance is None:
        radius = radius + error * np.abs(mid)
    else:
        # the slope's own error is absolute: at most 40 * 2^-53 from x (1 - sigmoid), beyond which sigmoid is 1
        slope = values * (1 + x.mid * (1 - values))
        moved = np.minimum(np.abs(slope) + 64 * OWN + 0.25 * x.r, 1.1) * x.r
        radius = radius + moved + _sigmoid_error(size + x.r, budgets) * (np.abs(mid) + moved)
        variance = variance + slope**2 * x.v + np.square(x.v) / 8
    # the absolute errors of the sigmoid: below the smallest normal value, and from its storage if it is stored
    lost = _sigmoid_lost(budgets)
    variance = variance + (size * lost) ** 2 / 3
    if stored.precision < budgets.accumulation.precision:
        lost = lost + ulp(np.minimum(values + 0.25 * x.r, 1.0), stored) / 2
        variance = variance + (size * ulp(values, stored)) ** 2 / 12
    radius = radius + (size + x.r) * lost + UNDERFLOW
    return Enclosure(mid, bounded(radius * SLACK), bounded(variance), accumulation=x.accumulation, owed=True)


@quiet
def softmax(x: Enclosure, mask: Any, exponentials: Any, budgets: Budgets, above: Any = 0.0) -> Enclosure:
    """The enclosure of softmax over the last axis, before its result is stored.

    exponentials: exp(x.mid - the largest x.mid), masked ones 0
    above: the distance from the largest x.mid up to the number that the engine subtracts

    The logarithm of each exponential errs by at most k. k covers the error of its argument, the rounding of the
    subtraction, and the budget of exp. A probability is largest if its own exponential is largest and all others are
    smallest.
    """
    x = x.settle()
    u, n = budgets.statistics.u, x.shape[-1]
    visible = np.broadcast_to(True if mask is None else mask, x.shape)
    below = np.where(visible, np.where(visible, x.mid, -np.inf).max(-1, keepdims=True) - x.mid, 0.0)
    mid = exponentials / exponentials.sum(-1, keepdims=True)
    own = u * (below + above) + relative_error(budgets.exp, budgets.statistics, below + above)
    k = own + OWN * (2 * below + 16)
    if x.radius is not None:
        r = np.where(visible, x.radius, 0.0)
        moved = r + r.max(-1, keepdims=True)  # the error of the argument of exp, including that of the largest
        k = k + r + u * moved + relative_error(budgets.exp, budgets.statistics, moved) - u * budgets.exp.constant
    high, low = np.where(visible, np.exp(k - below), 0.0), np.where(visible, np.exp(-k - below), 0.0)
    spare = n * OWN  # the error of the sums here: n positive numbers, from which one is subtracted
    others_low = np.maximum(low.sum(-1, keepdims=True) * (1 - spare) - low, 0.0)
    others_high = high.sum(-1, keepdims=True) * (1 + spare) - high
    most = np.where(np.isinf(high), 1.0, high / (high + others_low))
    least = np.where(np.isinf(others_high), 0.0, low / (low + others_high))
    # a sum of probabilities has n additions of positive terms; the division and its input round once each
    rounding = (n + 4) * u
    radius = np.maximum(most - mid, mid - least) + (rounding * (1 + rounding) + (n + 8) * OWN) * most
    radius = np.where(visible, bounded((radius + budgets.statistics.tiny) * SLACK), 0.0)
    if x.radius is not None:
        # an argument without a bound may be infinite, which makes the whole row NaN, masked values included
        radius = np.where(np.isfinite(r.max(-1, keepdims=True)), radius, np.inf)
    argument = own**2 / 3
    if x.variance is not None:
        argument = argument + (np.expm1(TAIL * np.sqrt(np.where(visible, x.variance, 0.0))) / TAIL) ** 2
    square = mid**2
    variance = square * (argument * (1 - 2 * mid) + (square * argument).sum(-1, keepdims=True))
    variance = np.maximum(variance, 0.0) + (u * mid) ** 2 * (n / 9 + 2) + budgets.statistics.tiny**2 / 3
    return Enclosure(mid, radius, np.where(visible, bounded(variance), 0.0), accumulation=budgets.accumulation)


@quiet
def log_softmax(x: Enclosure, exponentials: Any, budgets: Budgets, stored: Format) -> Enclosure:
    """The enclosure of log-softmax over the last axis, before its last rounding.

    x: [..., n]   exponentials: exp(x.mid - the largest x.mid)
    stored: the dtype of the sum of exponentials and of its logarithm

    An engine subtracts the largest argument and the logarithm of the sum, or both as one number, or takes the logarithm
    of a probability. A log-probability is largest if its own argument is largest and all others are smallest.
    """
    x = x.settle()
    u, n = budgets.statistics.u, x.shape[-1]
    r = np.broadcast_to(x.r, x.shape)
    most, total = x.mid.max(-1, keepdims=True), exponentials.sum(-1, keepdims=True)
    below, logarithm = most - x.mid, np.log(total)
    mid = -below - logarithm
    moved = r + r.max(-1, keepdims=True)  # the error of the argument of exp, including that of the largest
    own = u * below + relative_error(budgets.exp, budgets.statistics, below)
    k = own + u * moved + budgets.exp.slope * u * moved + OWN * (2 * below + 16)
    share = exponentials / total
    less, more = share * np.expm1(-r - k), share * np.expm1(r + k)
    all_less, all_more = less.sum(-1, keepdims=True), more.sum(-1, keepdims=True)
    spare = (n + 8) * OWN  # the error of the sums here
    # the change of the sum, over the sum: an argument moves its own term along, up to the error of that term's exp
    least = np.maximum(all_less * (1 + spare) - less + share * np.expm1(r - k), -1.0)
    largest = all_more * (1 + spare) - more + share * np.expm1(k - r)
    moves = np.maximum(r - np.log1p(least), r + np.log1p(largest))
    apart = log_softmax_apart(x, mid, budgets)
    # n additions of positive terms in any order, where those below the smallest normal value may be lost
    added = n * (u * (1 + n * u) + budgets.statistics.tiny)
    cut = np.zeros(())
    if stored.precision < budgets.statistics.precision:
        cut = stored.u * (1 + stored.u) + ulp(logarithm + np.log1p(all_more) + stored.u, stored) / 2
    radius = moves + apart + added + cut + OWN * (n + 16 + 4 * (below + logarithm + r))
    # an argument without a bound may be infinite, which makes the whole row NaN
    radius = np.where(np.isfinite(r.max(-1, keepdims=True)), radius, np.inf)
    # the errors of exp and log are budgets, which a row shares
    variance = ((share * own).sum(-1, keepdims=True) ** 2 + apart**2 + cut**2) / 3
    variance = variance + u**2 * n / 9 + (n * budgets.statistics.tiny) ** 2 / 3
    if x.variance is not None:
        v = np.broadcast_to(x.variance, x.shape)
        terms = (share * np.expm1(TAIL * np.sqrt(v)) / TAIL) ** 2
        variance = variance + v * (1 - share) ** 2 + np.maximum(terms.sum(-1, keepdims=True) - terms, 0.0)
    return Enclosure(mid, bounded(radius * SLACK), bounded(variance), accumulation=budgets.statistics, owed=True)


@quiet
def log_softmax_apart(x: Enclosure, mid: Any, budgets: Budgets) -> Any:
    """The largest error of a log-probability beyond that of the sum of exponentials, before its last rounding: [..., n]

    x: the settled arguments, [..., n]   mid: their log-softmax

    One of two is larger. A logarithm of a probability has the errors of one exponential, its quotient and the
    logarithm. A difference from the logarithm of the whole sum has the roundings of that. A logarithm errs by as much
    as exp may err at the result.
    """
    u = budgets.statistics.u
    r = np.broadcast_to(x.r, x.shape)
    widest = r.max(-1, keepdims=True)
    reach, level = x.mid.max(-1, keepdims=True) - x.mid + r + widest, np.abs(x.mid - mid).max(-1, keepdims=True)

    def error(at: Any) -> Any:
        return relative_error(budgets.exp, budgets.statistics, at)

    of_probability = u * reach + error(reach) + 2 * u + error(np.abs(mid) + r + widest)
    of_sum = error(np.log(x.shape[-1]) + 2 * widest) + u * (level + widest)
    return np.maximum(of_probability, of_sum)


@quiet
def unit_circle(
    positions: Any, logarithms: Any, cos: Any, sin: Any, budgets: Budgets, any_offset: bool = False
) -> tuple[Enclosure, Enclosure]:
    """The enclosures of cosine and sine of angles that an engine computes in the statistics dtype.

    positions: [T]   logarithms: [n], the natural logarithm of base^(numerator / denominator)   cos, sin: exact, [T, n]
    any_offset: whether the engine may count positions from another start; then cosine and sine are a pair
    The frequency errs by its budget, and the product with the position rounds once. At logarithm 0 the frequency is 1.
    """
    u = budgets.statistics.u
    positions = np.abs(np.asarray(positions, np.float64))[:, None]
    frequency = np.exp(-np.asarray(logarithms))
    error = np.where(logarithms == 0, 0.0, relative_error(budgets.angles, budgets.statistics, logarithms) + u)
    error = np.where(positions > 1 / u, error + u, error)  # the dtype may not hold larger integers
    off = positions * frequency * error * (1 + error) * SLACK
    last = budgets.circle.constant * u

    def part(value: Any, slope: Any) -> Enclosure:
        moved = np.minimum(np.abs(slope) * off + off**2 / 2, 2.0)
        # a whole column shares the error of its angle, so it counts as a budget, even where the slope is zero
        variance = (moved**2 + last**2) / 3
        return Enclosure(value, (moved + last + 2 * OWN) * SLACK, variance, accumulation=budgets.accumulation)

    if not any_offset:
        return part(cos, sin), part(sin, cos)
    # an angle's error moves the point by at most as much; cosine and sine have the other errors each
    moved, like, one = np.minimum(off, 2.0), np.zeros(cos.shape), np.ones(cos.shape)
    radius, variance = (moved + math.sqrt(2) * (last + 2 * OWN)) * SLACK + like, (moved**2 + last**2) / 3 + like
    pair = [Enclosure(x, radius, variance, accumulation=budgets.accumulation, length=one) for x in (cos, sin)]
    return pair[0], pair[1]


@quiet
def turned(mid: Any, x: Enclosure, table: tuple[Enclosure, Enclosure], stored: Format) -> Enclosure:
    """The enclosure of pairs that are turned by an angle, which may be off by an unknown constant.

    The radius bounds the length of a pair's error for every constant. So it does not depend on the angle: with a pair
    (a, b), the four products of a rotation round by at most u (|a| + |b|) in length.

    mid: [..., d], the exact pairs, element i with i + d / 2   x: the pairs before [..., d]
    table: cosine and sine, [..., d / 2]   stored: the dtype of the products
    """
    x, accumulation = x.settle(), x.accumulation
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    length, inherited = np.hypot(a.mid, b.mid), np.hypot(a.r, b.r)
    off, square = table[0].r, length**2
    u = accumulation.u + (0.0 if stored == accumulation else stored.u * (1 + accumulation.u))
    lost = 4 * (accumulation.tiny + stored.tiny)
    reach = (np.abs(a.mid) + np.abs(b.mid) + math.sqrt(2) * inherited) * (1 + off)
    radius = inherited * (1 + off) + length * off + (u + 8 * OWN) * reach + lost
    radius = bounded(unbounded_beyond(reach, unbounded_beyond(reach, radius, stored), accumulation) * SLACK)
    variance = np.maximum(a.v, b.v) * (1 + table[0].v) + square * table[0].v + u**2 / 3 * square + lost**2 / 3
    radius, variance, length = (
        np.concatenate([part, part], axis=-1)
        for part in np.broadcast_arrays(radius, bounded(variance + np.zeros(length.shape)), length)
    )
    return Enclosure(mid, radius, variance, accumulation=accumulation, owed=True, length=length)
