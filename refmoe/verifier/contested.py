# SPDX-License-Identifier: Apache-2.0
"""The choice of contestable codes: one must explain every output of a row, and all products that read the row.

The input of a product is rounded to codes. Rounding alone can decide a code that lies at a boundary. Each combination
of such codes is one choice. The first product that reads the row refutes those that its outputs contradict. The next
one that reads the same codes has the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.coded import candidates
from refmoe.arithmetic.formats import Format, nearest, ulp


class Contested:
    """The choices that the products of a pass have refuted so far."""

    def __init__(self) -> None:
        self._refuted: dict[int, set[int]] = {}
        """Per row the numbers of the choices."""

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
        return Enclosure(mid, radius, x.variance, accumulation=x.accumulation)


def _error(mid: Any, radius: Any, found: Any, format: Format) -> float:
    """The largest error of a row over what is allowed, infinite if a value is not finite.   all arrays: [n]"""
    ratio = np.abs(found - mid) / (radius + ulp(np.abs(mid) + radius, format) / 2)
    return float(np.where(np.isfinite(ratio), ratio, np.inf).max(initial=0.0))


def _legal(mid: Any, radius: Any, found: Any, format: Format) -> bool:
    """Whether every value of a row is in its interval.   all arrays: [n]"""
    return bool(((found >= nearest(mid - radius, format)) & (found <= nearest(mid + radius, format))).all())
