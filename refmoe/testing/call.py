# SPDX-License-Identifier: Apache-2.0
"""A call of a kernel: its inputs, the enclosure of its output, and calls with a mistake in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import ulp
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps


class Call(Protocol):
    """The inputs of a kernel, in the layout of the specification."""

    def some(self, at: Any) -> Self:
        """The call for some rows only.   at: integers [n]"""

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        """The enclosure of the output, before it is stored: [rows, ...]"""


@dataclass(frozen=True)
class Change:
    """A mistake that a kernel may have."""

    name: str
    """The mistake in words: what the kernel does."""
    call: Call
    """The call with the mistake."""
    bug: str = ""
    """The known bug of `refmoe.bugs` that this is, if it is one."""


@dataclass(frozen=True)
class Rounding:
    """Other arithmetic that a kernel may have: a policy."""

    name: str
    policy: Policy


@dataclass(frozen=True)
class Output:
    """An output of a kernel and what it must be."""

    what: str
    """The function under test, in words."""
    step: str
    """The tap whose cut point has the dtype of the output."""
    found: NDArray[Any]
    """The values to judge, in their own dtype, rows first; only the rows of `call`."""
    call: Call
    reads: NDArray[Any]
    """The rows that the step reads, of which equal ones err alike: [rows, n]."""
    where: Callable[[tuple[int, ...]], str]
    """The place of an element of `found`, in words."""
    changes: Callable[[], Iterable[Change]] = lambda: ()
    """The mistakes that a failure is searched for, the likeliest first."""
    cuts: tuple[str, ...] = ()
    """The cut points between the inputs and the output that a kernel may have stored more coarsely."""
    spans: int = 1
    """The number of steps from the inputs to the output."""
    normalises: bool = False
    """Whether one of these steps is a norm."""
    cost: int = 1
    """Elements of parameters that a row reads."""


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
    """The row of the right output that each row has, integers [T]; -1: zeros."""
    columns: NDArray[Any] | None = None
    """The column of the right output that each column has; -1: zeros. None: its own."""
    factor: float = 1.0

    def some(self, at: Any) -> Rearranged:
        return Rearranged(call=self.call, rows=self.rows[at], columns=self.columns, factor=self.factor)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        read, place = np.unique(np.maximum(self.rows, 0), return_inverse=True)
        x = whole(self.call.some(read).enclose(ops))[place.reshape(-1)]
        x = times(x, self.factor * (self.rows >= 0).reshape(-1, *[1] * (len(x.shape) - 1)))
        if self.columns is not None:
            columns = self.columns
            x = times(x.map(lambda part: part[..., np.maximum(columns, 0)]), columns >= 0)
        return x


@dataclass(frozen=True)
class Truncated:
    """The right values, cut off toward zero where they are stored, and not rounded to nearest."""

    call: Call
    step: str

    def some(self, at: Any) -> Truncated:
        return Truncated(self.call.some(at), self.step)

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        x = whole(self.call.enclose(ops))
        half = ulp(x.mid, ops.policy.at(self.step)) / 2
        return Enclosure(x.mid - np.sign(x.mid) * half, x.r, x.v, accumulation=x.accumulation)
