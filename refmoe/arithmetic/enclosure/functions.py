"""exp, sigmoid, softmax and the rotary angles: rules that know the error budget of a library function."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, SLACK, UNDERFLOW, Enclosure, bounded, quiet
from refmoe.arithmetic.enclosure.budgets import Budget, Budgets
from refmoe.arithmetic.formats import Format, ulp

EXP_REACH = 700.0
"""Beyond this argument exp has left every format: what its budget is there makes no difference."""

RSQRT = 3
"""Roundings of a square root by whose inverse one multiplies, beyond those of root and quotient: CUDA's rsqrtf errs by
2 ulp, which is 4 roundings."""

TAIL = 8.0
"""Standard deviations up to which exp of a normal error stays within as many of the spread that it is given."""


def relative_error(budget: Budget, format: Format, x: Any) -> Any:
    """The relative error that the budget allows at argument x."""
    return format.u * (budget.constant + budget.slope * np.abs(x))


@quiet
def exp(x: Enclosure, values: Any, budgets: Budgets) -> Enclosure:
    """values: exp(x.mid)."""
    x = x.settle()
    budget = relative_error(budgets.exp, budgets.statistics, np.minimum(np.abs(x.mid) + x.r, EXP_REACH))
    radius = values * np.expm1(x.r + budget + 4 * OWN) + budgets.statistics.tiny
    variance = values**2 * (x.v + budget**2 / 3) + budgets.statistics.tiny**2 / 3
    return Enclosure(values, bounded(radius * SLACK), bounded(variance), x.accumulation, owed=True)


@quiet
def sqrt(x: Enclosure) -> Enclosure:
    """The square root of what is known to be from zero up; or its inverse, by which something is then multiplied."""
    x = x.settle()
    mid = np.sqrt(x.mid)
    moved = np.where(x.mid > 0, x.r / (mid + np.sqrt(np.maximum(x.mid - x.r, 0.0))), np.sqrt(x.r))
    inverse = RSQRT * x.accumulation.u
    radius = moved + inverse * (mid + moved) + OWN * mid
    # to first order v / 4 m; and |sqrt(m') - sqrt(m)|^2 <= |m' - m| however small m is
    variance = np.where(x.mid > 0, np.minimum(x.v / (4 * x.mid), np.sqrt(x.v)), np.sqrt(x.v)) + (inverse * mid) ** 2 / 3
    return Enclosure(mid, bounded(radius * SLACK), bounded(variance), x.accumulation, owed=True)


def _sigmoid_error(size: Any, budgets: Budgets) -> Any:
    """Relative, at arguments up to this size: the budget of exp, 1 + exp(-x), and its inverse."""
    error = relative_error(budgets.exp, budgets.accumulation, np.minimum(size, EXP_REACH)) + 2 * budgets.accumulation.u
    return error * (1 + error)


def _sigmoid_lost(budgets: Budgets) -> Any:
    """What a sigmoid may lose however small it is: all below the smallest normal value, or the budget at 1."""
    if budgets.sigmoid == "absolute":
        return budgets.accumulation.tiny + relative_error(budgets.exp, budgets.accumulation, 0.0)
    return budgets.accumulation.tiny


@quiet
def sigmoid(x: Enclosure, values: Any, budgets: Budgets) -> Enclosure:
    """values: sigmoid(x.mid). The derivative is s (1 - s) <= 1/4, and changes by less than a tenth per unit of x."""
    x = x.settle()
    size = np.abs(x.mid)
    slope = values * (1 - values)
    moved = np.minimum(slope + 2 * OWN + 0.05 * x.r, 0.25) * x.r
    reach = np.minimum(values + moved, 1.0)
    # exp(-x) overflows only where the result is below the smallest normal value
    lost = _sigmoid_lost(budgets)
    radius = moved + _sigmoid_error(size + x.r, budgets) * reach + lost + 4 * OWN * values
    variance = slope**2 * x.v + (_sigmoid_error(size, budgets) * values) ** 2 / 3
    variance = variance + lost**2 / 3
    return Enclosure(values, bounded(radius * SLACK), bounded(variance), x.accumulation, owed=True)


@quiet
def silu(x: Enclosure, values: Any, budgets: Budgets, stored: Format) -> Enclosure:
    """x * sigmoid(x), before its last rounding; values: sigmoid(x.mid).

    As one function of x, since its parts are not independent: |silu'| <= 1.1 and |silu''| <= 1/2.
    """
    x = x.settle()
    size = np.abs(x.mid)
    mid = x.mid * values
    # the slope's own error is absolute: at most 40 * 2^-53 from x (1 - sigmoid), beyond which sigmoid is 1
    slope = values * (1 + x.mid * (1 - values))
    moved = np.minimum(np.abs(slope) + 64 * OWN + 0.25 * x.r, 1.1) * x.r
    reach = np.abs(mid) + moved
    radius = moved + _sigmoid_error(size + x.r, budgets) * reach + 4 * OWN * np.abs(mid)
    variance = slope**2 * x.v + (_sigmoid_error(size, budgets) * mid) ** 2 / 3 + np.square(x.v) / 8
    # what a sigmoid loses absolutely: below the smallest normal value, and where it is a stored value of its own
    lost = _sigmoid_lost(budgets)
    variance = variance + (size * lost) ** 2 / 3
    if stored.precision < budgets.accumulation.precision:
        lost = lost + ulp(np.minimum(values + 0.25 * x.r, 1.0), stored) / 2
        variance = variance + (size * ulp(values, stored)) ** 2 / 12
    radius = radius + (size + x.r) * lost + UNDERFLOW
    return Enclosure(mid, bounded(radius * SLACK), bounded(variance), x.accumulation, owed=True)


@quiet
def softmax(x: Enclosure, mask: Any, exponentials: Any, budgets: Budgets, above: Any = 0.0) -> Enclosure:
    """Softmax over the last axis, before its result is stored.

    exponentials: exp(x.mid - its largest), masked ones 0   above: how much larger than that is what is subtracted

    The logarithm of each exponential errs by k: by what its argument may be off, by the rounding of the subtraction of
    the largest, and by the budget of exp. A probability is then largest where its own exponential is largest and all
    others are smallest.
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
        moved = r + r.max(-1, keepdims=True)  # of the argument of exp, the largest itself included
        k = k + r + u * moved + relative_error(budgets.exp, budgets.statistics, moved) - u * budgets.exp.constant
    high, low = np.where(visible, np.exp(k - below), 0.0), np.where(visible, np.exp(-k - below), 0.0)
    spare = n * OWN  # our sums of n positive numbers, of which one is then taken away
    others_low = np.maximum(low.sum(-1, keepdims=True) * (1 - spare) - low, 0.0)
    others_high = high.sum(-1, keepdims=True) * (1 + spare) - high
    most = np.where(np.isinf(high), 1.0, high / (high + others_low))
    least = np.where(np.isinf(others_high), 0.0, low / (low + others_high))
    # sums of probabilities err by n additions of positive terms; the division rounds once, and so does its input
    rounding = (n + 4) * u
    radius = np.maximum(most - mid, mid - least) + (rounding * (1 + rounding) + (n + 8) * OWN) * most
    radius = np.where(visible, bounded((radius + budgets.statistics.tiny) * SLACK), 0.0)
    if x.radius is not None:
        # an argument without a bound may be an infinity, which makes NaN of the whole row, what is masked included
        radius = np.where(np.isfinite(r.max(-1, keepdims=True)), radius, np.inf)
    argument = own**2 / 3
    if x.variance is not None:
        argument = argument + (np.expm1(TAIL * np.sqrt(np.where(visible, x.variance, 0.0))) / TAIL) ** 2
    square = mid**2
    variance = square * (argument * (1 - 2 * mid) + (square * argument).sum(-1, keepdims=True))
    variance = np.maximum(variance, 0.0) + (u * mid) ** 2 * (n / 9 + 2) + budgets.statistics.tiny**2 / 3
    return Enclosure(mid, radius, np.where(visible, bounded(variance), 0.0), budgets.accumulation)


@quiet
def unit_circle(positions: Any, logarithms: Any, cos: Any, sin: Any, budgets: Budgets) -> tuple[Enclosure, Enclosure]:
    """Cosine and sine of angles that an engine computes in the statistics dtype.

    positions: [T]   logarithms: [n], the natural logarithm of base^(numerator / denominator)   cos, sin: exact, [T, n]
    The frequency errs by its budget, the product with the position rounds once. At logarithm 0 the frequency is 1.
    """
    u = budgets.statistics.u
    positions = np.abs(np.asarray(positions, np.float64))[:, None]
    frequency = np.exp(-np.asarray(logarithms))
    error = np.where(logarithms == 0, 0.0, relative_error(budgets.angles, budgets.statistics, logarithms) + u)
    error = np.where(positions > 1 / u, error + u, error)  # larger integers need not be values of the dtype
    off = positions * frequency * error * (1 + error) * SLACK
    last = budgets.circle.constant * u

    def part(value: Any, slope: Any) -> Enclosure:
        moved = np.minimum(np.abs(slope) * off + off**2 / 2, 2.0)
        # an angle's error is one for a whole column: it counts as a budget, and never as none
        variance = (moved**2 + last**2) / 3
        return Enclosure(value, (moved + last + 2 * OWN) * SLACK, variance, budgets.accumulation)

    return part(cos, sin), part(sin, cos)
