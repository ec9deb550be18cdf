# SPDX-License-Identifier: Apache-2.0
"""The choice of contestable codes: one must explain every output of a row, and all products that read the row.

The input of a product is rounded to codes. Rounding alone can decide a code that lies at a boundary. Each combination
of such codes is one choice. The first product that reads the row refutes those that its outputs contradict. The next
one that reads the same codes has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.codes import Contest
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.coded import candidates
from refmoe.arithmetic.formats import Format, nearest, ulp


@dataclass(frozen=True)
class Row:
    """A row of a product's outputs whose input has contestable codes."""

    place: tuple[int, ...]
    """The place of its first output."""
    contest: Contest
    left: tuple[int, ...]
    """The numbers of the choices that no product has refuted; empty where this product refutes all of them."""

    def found(self, code: int) -> float | None:
        """The code that the engine has; None where the outputs leave it open.   code: its number in the contest"""
        made = {self.contest.choices[choice][code] for choice in self.left}
        return made.pop() if len(made) == 1 else None


class Contested:
    """The choices that the products of a pass have refuted so far."""

    def __init__(self) -> None:
        self._refuted: dict[int, set[int]] = {}
        """Per row the numbers of the choices."""
        self._wrong: set[int] = set()
        """The rows all of whose choices the last product has refuted."""

    def explained(self, x: Enclosure, found: Any, format: Format) -> Enclosure:
        """The enclosure with, in each row, the choice under which the values found err least.

        x: before the last rounding   found: of the same shape   format: of the last rounding
        A row all of whose choices are refuted was not made from this input. The next product has all of them again.
        """
        if x.choices is None:
            return x
        values = np.asarray(found, np.float64)
        mid, radius = x.mid.copy(), np.array(x.radius)
        for row, at, mids in candidates(x):
            own, y = x.choices.radius[at], values[at]
            before = self._refuted.get(row, set())
            left = [i for i in range(len(mids)) if i not in before]
            error = {i: _error(mids[i], own, y, format) for i in left}
            best = min(left, key=error.__getitem__)
            mid[at], radius[at] = mids[best], own
            wrong = {i for i in left if not _legal(mids[i], own, y, format)}
            self._refuted[row] = set() if len(wrong) == len(left) else before | wrong
            (self._wrong.add if len(wrong) == len(left) else self._wrong.discard)(row)
        return Enclosure(mid, radius, x.variance, accumulation=x.accumulation)

    def rows(self, x: Enclosure) -> Iterator[Row]:
        """The rows of a product that have choices, with what its outputs leave of them.   x: as for `explained`"""
        contests = {} if x.choices is None else x.choices.contests
        for row, at, _ in candidates(x):
            if row in contests:
                every, refuted = range(len(contests[row].choices)), self._refuted.get(row, set())
                left = () if row in self._wrong else tuple(each for each in every if each not in refuted)
                place = np.unravel_index(int(np.argmax(at)), at.shape)
                yield Row(place=tuple(map(int, place)), contest=contests[row], left=left)


def _error(mid: Any, radius: Any, found: Any, format: Format) -> float:
    """The largest error of a row over what is allowed, infinite if a value is not finite.   all arrays: [n]"""
    ratio = np.abs(found - mid) / (radius + ulp(np.abs(mid) + radius, format) / 2)
    return float(np.where(np.isfinite(ratio), ratio, np.inf).max(initial=0.0))


def _legal(mid: Any, radius: Any, found: Any, format: Format) -> bool:
    """Whether every value of a row is in its interval.   all arrays: [n]"""
    return bool(((found >= nearest(mid - radius, format)) & (found <= nearest(mid + radius, format))).all())
