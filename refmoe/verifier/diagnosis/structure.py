# SPDX-License-Identifier: Apache-2.0
"""Structures of a failed step: its right values in another order, shifted, transposed, or times a factor.

A structure is found by distances at the first failed tap of the step. It is then proven as a mutant is: the enclosures
are moved in the same way, and every failed tap of the step must pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import Format
from refmoe.spec.config import Config
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.verifier.blocks import without_bound
from refmoe.verifier.diagnosis.evidence import Evidence, UnderBug, judge_again
from refmoe.verifier.findings import FAIL, PASS, STRUCTURE, Explanation, proven
from refmoe.verifier.passes import Key

AXES = {
    "T": "token", "H": "head", "K": "key/value head", "E": "expert", "k": "slot", "S": "cached position",
    "F": "hidden unit", "D": "channel", "d": "channel", "V": "vocabulary entry",
}  # fmt: skip
"""The noun for one index along a dimension of a tap."""
LONGEST = 4096
"""The most slices along an axis for which a reordering is sought. All distances between slices must fit in memory."""
CLOSE = 0.3
"""The largest residual with which a hypothesis is worth a proof."""

Move = Callable[[Enclosure], Enclosure]


@dataclass(frozen=True)
class Hypothesis:
    """A structure that may explain a step.   move: changes the right values as the step may have done"""

    name: str
    about: str
    fix: str
    move: Move


class Moved(UnderBug):
    """A pass that moves the enclosures of the taps `at` before it tests the trace."""

    def __init__(self, *arguments: Any, move: Move, at: Set[Key]) -> None:
        super().__init__(*arguments)
        self._move, self._at = move, at

    def _tap(self, name: str, x: Any) -> Any:
        return super()._tap(name, self._move(x) if (self._run.run, name) in self._at else x)


def structural(evidence: Evidence) -> list[Explanation]:
    """The structures that explain all failed taps of their step, in order of computation."""
    found = []
    for step in dict.fromkeys(check.step for check in evidence.failed):
        checks = [check for check in evidence.failed if check.step == step]
        first = next(((c.run, c.tap) for c in checks if (c.run, c.tap) in evidence.expected), None)
        if first is None:
            continue
        at = {(check.run, check.tap) for check in checks}
        for hypothesis in hypotheses(evidence, first, step):
            judge = partial(Moved, move=hypothesis.move, at=at)
            verdicts = judge_again(evidence, evidence.right, evidence.policy, judge)
            here = [verdicts[key] for key in sorted(at)]
            still = sum(verdict == FAIL for verdict in here)
            if not still and PASS in here:
                about = f"{hypothesis.about} in {step}"
                found.append(proven(name=f"{step}: {hypothesis.name}", kind=STRUCTURE, about=about, fix=hypothesis.fix))
                break
    return found


def hypotheses(evidence: Evidence, key: Key, step: str) -> Iterator[Hypothesis]:
    """The hypotheses that fit one tap by distance, simplest first."""
    right = evidence.expected[key]
    found = np.asarray(evidence.trace.get(*key), np.float64)
    error = float(np.linalg.norm(found - right)) if right.size else 0.0
    if not (np.isfinite(found).all() and np.isfinite(right).all() and error > 0):
        return
    dimensions = (LAYER_TAPS | MODEL_TAPS)[step].split()
    yield from constant_factor(right, found, error, evidence.policy.at(step), evidence.right.config)
    if dimensions[0] == "T":
        yield from token_shifts(right, found, error)
    for axis, dimension in enumerate(dimensions):
        yield from reordered(right, found, error, axis, AXES[dimension])
    yield from transposed(right, found, error, dimensions)


def constant_factor(right: Any, found: Any, error: float, format: Format, config: Config) -> Iterator[Hypothesis]:
    """The hypothesis found = c right. c is known only up to one rounding of the storage dtype."""
    size = float((right * right).sum())
    factor = float((found * right).sum()) / size if size else 1.0
    if np.linalg.norm(found - factor * right) > CLOSE * error:
        return
    factor = _simple(factor, format, config)[0]
    radius = abs(factor) * format.u

    def move(x: Enclosure) -> Enclosure:
        scale = Enclosure(factor, np.asarray(radius), np.asarray(radius * radius / 3), accumulation=x.accumulation)
        return x * scale

    name = _simple(factor, format, config)[1]
    yield Hypothesis(
        name=f"times {name}",
        about=f"all values are {name} times what they should be",
        fix="look for a scale that is applied twice, or not at all, or for the inverse of it",
        move=move,
    )


def _simple(factor: float, format: Format, config: Config) -> tuple[float, str]:
    """A factor and its name. A factor near a number that this model uses, such as sqrt(head_dim), takes that number."""
    known: dict[str, float] = {"-1": -1.0, "2": 2.0, "1/2": 0.5, "log2(e)": math.log2(math.e), "ln(2)": math.log(2)}
    sizes = {"head_dim": config.head_dim, "dim": config.dim, "experts_per_token": config.experts_per_token}
    for name, value in sizes.items():
        known |= {
            f"sqrt({name}) = {math.sqrt(value):.6g}": math.sqrt(value), f"{name} = {value}": float(value),
            f"1/sqrt({name}) = {1 / math.sqrt(value):.6g}": 1 / math.sqrt(value),
            f"1/{name} = {1 / value:.6g}": 1 / value,
        }  # fmt: skip
    for name, number in known.items():
        if abs(factor - number) <= 4 * format.u * abs(number):
            return number, name
    return factor, f"{factor:.{max(2, round(format.precision * math.log10(2)) + 1)}g}"


def token_shifts(right: Any, found: Any, error: float) -> Iterator[Hypothesis]:
    """The hypotheses that row t holds the values of row t - 1 or t + 1. The row at the end has no bound."""
    count = len(right)
    for by, other in ((1, "the token before"), (-1, "the token after")):
        if count <= 1:
            return
        inner = slice(1, None) if by == 1 else slice(None, -1)
        if np.linalg.norm(found[inner] - np.roll(right, by, axis=0)[inner]) > CLOSE * error:
            continue

        def move(x: Enclosure, by: int = by) -> Enclosure:
            rolled = x.map(lambda part: np.roll(np.broadcast_to(part, x.shape), by, axis=0))
            return without_bound(rolled, [0 if by == 1 else -1])

        yield Hypothesis(
            name=f"shifted by {by:+d} token",
            about=f"each token holds what belongs to {other}",
            fix="look at where the rows of a call begin: an index from one, a token added or dropped",
            move=move,
        )


def reordered(right: Any, found: Any, error: float, axis: int, noun: str) -> Iterator[Hypothesis]:
    """The hypothesis that slice i along an axis holds the values of slice p(i)."""
    count = right.shape[axis]
    if not 2 <= count <= LONGEST:
        return
    a, b = (np.moveaxis(part, axis, 0).reshape(count, -1) for part in (found, right))
    distance: Any = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * (a @ b.T)
    sources = distance.argmin(1)
    own = np.diagonal(distance) <= distance.min(1) + 1e-12 * (a * a).sum(1)
    sources = np.where(own, np.arange(count), sources)
    if (sources == np.arange(count)).all() or np.linalg.norm(a - b[sources]) > CLOSE * error:
        return

    def move(x: Enclosure) -> Enclosure:
        if x.shape[axis] != count:
            return x
        return x.map(lambda part: np.take(np.broadcast_to(part, x.shape), sources, axis=axis))

    permuted = len(set(sources.tolist())) == count
    moved = [(int(i), int(p)) for i, p in enumerate(sources) if i != p]
    listed = ", ".join(f"{i} holds {p}" for i, p in moved[:6]) + (", ..." if len(moved) > 6 else "")
    yield Hypothesis(
        name=f"{noun}s {'permuted' if permuted else 'taken from others'}",
        about=f"{len(moved)} of {count} {noun}s hold what belongs to another ({listed})",
        fix=f"look at the order of {noun}s where this step's weights are loaded, split or reshaped",
        move=move,
    )


def transposed(right: Any, found: Any, error: float, dimensions: list[str]) -> Iterator[Hypothesis]:
    """The hypotheses that two axes are exchanged in memory: by a reshape instead of a transposition, or the reverse."""
    for i, j in combinations(range(right.ndim), 2):
        if 1 in (right.shape[i], right.shape[j]):
            continue
        for exchange in (exchanged_after, exchanged_before):
            if np.linalg.norm(found - exchange(right, i, j)) > CLOSE * error:
                continue

            def move(x: Enclosure, exchange: Any = exchange, i: int = i, j: int = j) -> Enclosure:
                return x.map(lambda part: exchange(np.broadcast_to(part, x.shape), i, j))

            one, two = AXES[dimensions[i]], AXES[dimensions[j]]
            yield Hypothesis(
                name=f"{one}s and {two}s transposed",
                about=f"the axes of {one}s and {two}s are exchanged in memory",
                fix="look for a reshape where a transposition belongs",
                move=move,
            )


def exchanged_after(values: Any, i: int, j: int) -> Any:
    """The values with axes i and j exchanged, read in the old shape."""
    return np.swapaxes(values, i, j).reshape(values.shape)


def exchanged_before(values: Any, i: int, j: int) -> Any:
    """The values read in the shape with axes i and j exchanged, and then exchanged."""
    shape = list(values.shape)
    shape[i], shape[j] = shape[j], shape[i]
    return np.swapaxes(values.reshape(shape), i, j)
