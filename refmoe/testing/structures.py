# SPDX-License-Identifier: Apache-2.0
"""The right values in another order or place, times a factor, cut off, or after a coarser rounding on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import Format, nearest, ulp
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.call import Call


def whole(x: Enclosure) -> Enclosure:
    """The enclosure with its owed rounding, and with arrays of the full shape."""
    x = x.settle()
    radius, variance = (np.broadcast_to(np.asarray(part, np.float64), x.shape) for part in (x.r, x.v))
    return Enclosure(x.mid, radius, variance, accumulation=x.accumulation)


def times(x: Enclosure, factor: Any) -> Enclosure:
    """The enclosure times a factor, without a rounding. factor: a number, or an array that broadcasts"""
    x = whole(x)
    factor = np.asarray(factor, np.float64)
    return Enclosure(x.mid * factor, x.r * np.abs(factor), x.v * factor**2, accumulation=x.accumulation)


@dataclass(frozen=True)
class Rearranged:
    """The right values in other rows or columns, or times a factor."""

    call: Call
    rows: NDArray[Any]
    """The row of the right output that each row has, integers [T]."""
    columns: NDArray[Any] | None = None
    """The column of the right output that each column has. None: its own."""
    factor: float = 1.0

    def some(self, at: Any) -> Rearranged:
        return replace(self, rows=self.rows[at])

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        read, place = np.unique(self.rows, return_inverse=True)
        x = times(self.call.some(read).enclose(ops), self.factor)[place.reshape(-1)]
        columns = self.columns
        return x if columns is None else x.map(lambda part: part[..., columns])


@dataclass(frozen=True)
class Masked:
    """The right values, with zeros in some places."""

    call: Call
    kept: NDArray[Any]
    """Booleans of the output's shape."""

    def some(self, at: Any) -> Masked:
        return Masked(self.call.some(at), self.kept[at])

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        return times(self.call.enclose(ops), self.kept)


@dataclass(frozen=True)
class Truncated:
    """The right values, cut off toward zero where they are stored, and not rounded to nearest."""

    call: Call
    format: Format

    def some(self, at: Any) -> Truncated:
        return Truncated(self.call.some(at), self.format)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        x = whole(self.call.enclose(ops))
        spacing = ulp(x.mid, self.format)
        ends = [np.trunc((x.mid + side) / spacing) * spacing for side in (-x.r, x.r)]
        mid = np.trunc(x.mid / spacing) * spacing
        radius = np.maximum(np.abs(ends[0] - mid), np.abs(ends[1] - mid))
        return Enclosure(mid, radius, np.where(radius > 0, radius**2, 0.0), accumulation=x.accumulation)


@dataclass(frozen=True)
class Rounded:
    """The right values, rounded to a coarser dtype before they are stored."""

    call: Call
    format: Format

    def some(self, at: Any) -> Rounded:
        return Rounded(self.call.some(at), self.format)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        x = whole(self.call.enclose(ops))
        ends = [nearest(x.mid + side, self.format) for side in (-x.r, x.r)]
        mid = nearest(x.mid, self.format)
        radius = np.maximum(np.abs(ends[0] - mid), np.abs(ends[1] - mid))
        return Enclosure(mid, radius, np.where(radius > 0, radius**2, 0.0), accumulation=x.accumulation)


@dataclass(frozen=True)
class StoredBetween:
    """The right values, if what is between two steps is stored in a coarser dtype."""

    call: Call
    cut: str
    """The cut point."""
    format: Format

    def some(self, at: Any) -> StoredBetween:
        return replace(self, call=self.call.some(at))

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        rounding = RoundingOps(ops, self.cut, self.format)
        x = self.call.enclose(rounding)
        ops.events += rounding.events
        return x


class RoundingOps(EnclosureOps):
    """Ops that round to a coarser dtype at one cut point, where others may but need not round."""

    def __init__(self, ops: EnclosureOps, cut: str, format: Format) -> None:
        policy = ops.policy
        super().__init__(replace(policy, cuts={**policy.cuts, cut: format}))
        self._forced = (cut, format)

    def cut(self, name: str, x: Enclosure) -> Enclosure:
        result = super().cut(name, x)
        cut, format = self._forced
        if name != cut:
            return result
        mid = nearest(result.mid, format)
        radius = result.r + np.abs(mid - result.mid)
        return Enclosure(mid, radius, result.variance, accumulation=result.accumulation)
