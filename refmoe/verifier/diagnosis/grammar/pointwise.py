# SPDX-License-Identifier: Apache-2.0
"""Changes of each value or row by itself: a constant added, a clamp, a soft cap, a sign or a function left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import ulp
from refmoe.verifier.diagnosis.grammar.factors import VECTOR_BITS
from refmoe.verifier.diagnosis.grammar.fault import AXES, CLOSE, Fault, Predict, Search
from refmoe.verifier.diagnosis.grammar.laboratory import NORMS, Laboratory
from refmoe.verifier.diagnosis.grammar.views import View, layer, stored_again, tokens_of
from refmoe.verifier.passes import Key

NUMBER_BITS = 12.0


def pointwise(search: Search, view: View) -> Iterator[Fault]:
    """The changes of single values that explain a view."""
    if view.pairs:
        yield from _constants(search, view)
    yield from _limited(search, view)
    yield from _functions(search, view)


# ---- constants


def _constants(search: Search, view: View) -> Iterator[Fault]:
    """A number added to all values, to each row, or to each channel."""
    last = len(view.dims) - 1
    yield from _constant(search, view, "a number added to all values", lambda x: x.mean(keepdims=True), 1)
    if last and next(iter(view.pairs.values()))[0].shape[-1] >= 4:
        yield from _log_softmax(search, view)
        noun = "row"
        yield from _constant(search, view, f"each {noun} off by a constant", lambda x: x.mean(-1, keepdims=True), 4)
    if view.dims[0] == "T" and last:
        yield from _bias(search, view)


def _constant(search: Search, view: View, words: str, fit: Callable[[Any], Any], numbers: int) -> Iterator[Fault]:
    left = whole = 0.0
    constants: dict[Key, Any] = {}
    if numbers == 1:
        errors = [tokens_of(view, search, key, had - right).reshape(-1) for key, (right, had) in view.pairs.items()]
        every = float(np.concatenate(errors).mean())
    for key, (right, had) in view.pairs.items():
        error = had - right
        constants[key] = np.full((1,) * right.ndim, every) if numbers == 1 else fit(error)
        rest = tokens_of(view, search, key, error - constants[key])
        error = tokens_of(view, search, key, error)
        left, whole = left + float((rest**2).sum()), whole + float((error**2).sum())
    if not whole or not left <= CLOSE**2 * whole:
        return
    said = f" ({every:.5g})" if numbers == 1 else ""

    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure | None:
        if numbers > 1 and key not in constants:
            return None
        constant = constants[key] if key in constants else np.full((1,) * x.mid.ndim, every)
        room = 2 * ulp(np.abs(constant) + np.abs(x.mid).max(-1, keepdims=True), search.format)
        y = lab.ops.cut(search.step, x) if not view.name else x
        moved: Enclosure = y + Enclosure(constant, room, room**2 / 3, accumulation=x.accumulation)
        return stored_again(search, view, moved)

    yield Fault(
        name=f"{words}{said}{view.of}",
        about=f"{words}{said}{view.of}",
        fix="look for a bias, or a normalisation, that does not belong here",
        bits=NUMBER_BITS if numbers == 1 else 16.0,
        predict=view.predict(move),
    )


def _log_softmax(search: Search, view: View) -> Iterator[Fault]:
    if view.name or search.step not in ("logits", "router.logits"):
        return

    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure:
        x = lab.ops.cut(search.step, x)
        most = x.mid.max(-1, keepdims=True)
        total = most + np.log(np.exp(x.mid - most).sum(-1, keepdims=True))
        room = np.broadcast_to(x.r, x.mid.shape).max(-1, keepdims=True) + 4 * ulp(
            np.abs(total) + np.abs(most), search.format
        )
        moved: Enclosure = x + Enclosure(-total, room, room**2 / 3, accumulation=x.accumulation)
        return moved

    yield Fault(
        name="log-probabilities instead of logits: each row is off by a constant",
        about="each row is less by the logarithm of the sum of its exponentials: these are log-probabilities",
        fix="dump the logits before the log-softmax",
        bits=3.0,
        predict=view.predict(move),
    )
    yield Fault(
        name="probabilities instead of logits",
        about="each row is the softmax of what it should be: these are probabilities",
        fix="dump the logits before the softmax",
        bits=3.0,
        predict=lambda lab, key: lab.ops.softmax(lab.ops.cut(search.step, lab.right(key)), None),
    )


def _bias(search: Search, view: View) -> Iterator[Fault]:
    """Every token of a layer with the same vector added."""
    vectors, left, whole = {}, 0.0, 0.0
    layers = {layer(key) for key in view.pairs}
    for at in layers:
        errors = [
            tokens_of(view, search, key, had - right) for key, (right, had) in view.pairs.items() if layer(key) == at
        ]
        joined = np.concatenate([each.reshape(-1, *each.shape[1:]) for each in errors])
        if len(joined) < 3:
            return
        vectors[at] = joined.mean(0)
        left, whole = left + float(((joined - vectors[at]) ** 2).sum()), whole + float((joined**2).sum())
    if not whole or not left <= CLOSE**2 * whole:
        return

    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure | None:
        if layer(key) not in vectors:
            return None
        room = 2 * ulp(np.abs(vectors[layer(key)]) + np.abs(x.mid).max(0), search.format)
        y = lab.ops.cut(search.step, x) if not view.name else x
        moved: Enclosure = y + Enclosure(vectors[layer(key)], room, room**2 / 3, accumulation=x.accumulation)
        return moved

    noun = AXES[view.dims[-1]]
    size = sum(vector.size for vector in vectors.values())
    yield Fault(
        name=f"a constant added to each {noun}{view.of}",
        about=f"a constant added to each {noun}{view.of}, the same for all tokens",
        fix="look for a bias: Mixtral has none",
        bits=VECTOR_BITS * size,
        predict=view.predict(move),
    )


# ---- limits

Function = Callable[[Any, float], Any]


def soft_cap(x: Any, c: float) -> Any:
    return c * np.tanh(x / c)


LIMITS: tuple[tuple[str, Function], ...] = (
    ("clamped to {} in size", lambda x, c: np.clip(x, -c, c)),
    ("clamped to at most {}", lambda x, c: np.minimum(x, c)),
    ("clamped to at least -{}", lambda x, c: np.maximum(x, -c)),
    ("soft-capped at {}", soft_cap),
)
"""Limits of values by one number, in words."""
ADDED: tuple[tuple[str, Function], ...] = (
    ("a number added to all values ({})", lambda x, c: x + c),
    ("a number added to all values (-{})", lambda x, c: x - c),
)
"""Numbers that are added to inputs that the output does not determine."""
FACTORS: tuple[tuple[str, Function], ...] = (("times {}", lambda x, c: x * c), ("times -{}", lambda x, c: -x * c))
"""Factors of the gate, which the output determines only in part."""
FINEST, COARSEST = 300.0, 3e-5
"""The largest and smallest number that is tried, over the largest value."""


def _limited(search: Search, view: View) -> Iterator[Fault]:
    """The values limited by a number, which is sought by its effect."""
    if search.least < NUMBER_BITS:
        return
    inverted = bool(view.pairs) and not (view.name and search.step in NORMS)
    keys = list(view.pairs)[:4] if inverted else search.by_size[-1:]
    rights = {key: view.base(search.rough, key).mid for key in keys}
    top = max(float(np.abs(right).max(initial=0.0)) for right in rights.values())
    if not 0 < top < np.inf:
        return

    def loss(function: Function, log: float) -> float:
        c = float(np.exp(log))
        if not inverted:
            return max(
                search.left(key, view.lift(search.rough, key, Enclosure(function(right, c))))
                for key, right in rights.items()
            )
        total = 0.0
        for key, right in rights.items():
            total += float((tokens_of(view, search, key, view.pairs[key][1] - function(right, c)) ** 2).sum())
        return total

    grid = np.linspace(np.log(top * COARSEST), np.log(top * FINEST), 60 if inverted else 24)
    nothing = loss(lambda x, c: x, 0.0)
    gate = FACTORS if view.name == "the gate" else ()
    for words, function in LIMITS if inverted else (*LIMITS, *ADDED, *gate):
        best = least(partial(loss, function), grid, nothing)
        if best is None or not loss(function, best) <= CLOSE ** (1 + inverted) * nothing:
            continue
        ladder = (3e-2, 3e-3, 1e-4, 4 * search.u, 1e-7)
        for c in dict.fromkeys(rounded(float(np.exp(best)), tolerance) for tolerance in ladder):
            yield _limit(search, view, words.format(f"{c:.6g}"), function, c)


def _limit(search: Search, view: View, words: str, function: Function, c: float) -> Fault:
    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure:
        y = (x if view.name else lab.ops.cut(search.step, x)).settle()
        mid = function(y.mid, c)
        room = 4 * lab.policy.statistics.u * (np.abs(y.mid) + np.abs(mid)) * (function is soft_cap)
        # a limit is held in the storage dtype
        room = np.where(mid == y.mid, 0.0, room + search.u * np.abs(mid))
        radius, variance = np.broadcast_to(y.r, mid.shape) + room, np.broadcast_to(y.v, mid.shape) + room**2 / 3
        moved = Enclosure(mid, radius, variance, accumulation=x.accumulation)
        return stored_again(search, view, moved)

    return Fault(
        name=f"{words}{view.of}",
        about=f"the values{view.of} are {words}",
        fix="look for a limit that this model does not have",
        bits=NUMBER_BITS + 2.0 * bool(view.name),
        predict=view.predict(move),
    )


def least(loss: Callable[[float], float], grid: Any, nothing: float = np.inf) -> float | None:
    """The minimum of a function near the best point of a grid, by golden section.

    nothing: the value of no change. None if no point of the grid is clearly better.
    """
    values = [loss(float(each)) for each in grid]
    values = [each if np.isfinite(each) else np.inf for each in values]
    at = int(np.argmin(values))
    if not values[at] < 0.97 * nothing:
        return None
    low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, len(grid) - 1)])
    ratio = (np.sqrt(5) - 1) / 2
    one, two = high - ratio * (high - low), low + ratio * (high - low)
    first, second = loss(one), loss(two)
    while high - low > 1e-9 * max(1.0, abs(low)):
        if first < second:
            high, two, second = two, one, first
            one = high - ratio * (high - low)
            first = loss(one)
        else:
            low, one, first = one, two, second
            two = low + ratio * (high - low)
            second = loss(two)
    return (low + high) / 2


def rounded(number: float, tolerance: float) -> float:
    """The number with the fewest decimal digits within a relative tolerance."""
    for digits in range(1, 9):
        short = float(f"{number:.{digits}g}")
        if abs(short - number) <= max(tolerance, 1e-9) * abs(number):
            return short
    return number


# ---- functions


def _functions(search: Search, view: View) -> Iterator[Fault]:
    """Other functions of the gate, and a norm of the mean."""
    if search.step != "expert.hidden" or view.name:
        return
    choices: tuple[tuple[str, Callable[[Laboratory, Any, Any], Any]], ...] = (
        ("gate and up exchanged", lambda lab, gate, up: lab.ops.silu(up) * gate),
        ("the activation left out", lambda lab, gate, up: gate * up),
        ("the factor of the gate left out", lambda lab, gate, up: lab.ops.silu(gate)),
        ("the sigmoid of the gate in place of its silu", lambda lab, gate, up: lab.ops.sigmoid(gate) * up),
        ("1 added to the factor of the gate", lambda lab, gate, up: lab.ops.silu(gate) * (up + 1.0)),
        (
            "ReLU in place of silu",
            lambda lab, gate, up: gate.settle().map(lambda part: np.where(gate.mid > 0, part, 0.0)) * up,
        ),
    )
    for words, function in choices:
        yield Fault(
            name=words,
            about=f"the hidden units are computed with {words}",
            fix="hidden = silu(gate) * up",
            bits=3.0,
            predict=_hidden(function),
        )


def _hidden(function: Callable[[Laboratory, Any, Any], Any]) -> Predict:
    return lambda lab, key: function(lab, lab.inputs(key)["gate"], lab.inputs(key)["up"])
