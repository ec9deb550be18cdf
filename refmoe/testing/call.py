# SPDX-License-Identifier: Apache-2.0
"""A call of a kernel: its inputs, the enclosure of its output, and calls with a mistake in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps

SPREADS = 6.0
"""Standard deviations that every limit allows for which an output is proven."""
LEAST = 1 - 2.0**-10
"""A factor that covers the error of computing a room."""
WIDE = np.dtype(np.float64)
EXPONENT = np.int64(0x7FF0000000000000)
"""The bits of a binary64 that hold its exponent."""


class Call(Protocol):
    """The inputs of a kernel, in the layout of the specification."""

    def some(self, at: Any) -> Self:
        """The call for some rows only.   at: integers [n]"""

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        """The enclosure of the output, before it is stored: [rows, ...]"""


@dataclass(frozen=True)
class Room:
    """Numbers that an output may be before it is stored: those that are near enough to the exact result."""

    exact: NDArray[Any]
    """Binary64, of the output's shape. Its error is far below the slack."""
    slack: NDArray[Any]
    """Binary64, of the same shape: distances that are less than the radius, and than `SPREADS` standard deviations."""


class Provable(ABC):
    """A call whose enclosure has a room that takes a few passes to compute."""

    @abstractmethod
    def some(self, at: Any) -> Self:
        """The call for some rows only."""

    @abstractmethod
    def room(self, policy: Policy) -> Room | None:
        """The room that the enclosure gives at least; None where it is not known.

        policy: one whose sums and statistics are in float32
        """


def power_of_two(x: NDArray[Any]) -> NDArray[Any]:
    """The largest power of two that |x| reaches, and 0 where there is none. x, result: binary64 [...]"""
    power: NDArray[Any] = (x.view(np.int64) & EXPONENT).view(np.float64)
    return power


class Plain(Provable):
    """A call that can be evaluated without an enclosure. So a large output is judged in part."""

    @property
    def axis(self) -> int:
        """The axis of the output along which it is judged in part: 0 for rows, 1 for columns or heads."""
        return 0

    @property
    def terms(self) -> int:
        """The number of terms that a value sums."""
        return 1

    def room(self, policy: Policy) -> Room | None:
        return None

    def part(self, at: Any) -> Self:
        """The call for some places of the axis only."""
        return self.some(at)

    def narrow(self, at: Any) -> Self | None:
        """The call for some places of the next axis of the output, of all its rows; None if it has no such part."""
        return None

    @abstractmethod
    def plain(self, dtype: Any) -> NDArray[Any]:
        """The output in float32 or float64, roughly: [rows, ...]"""

    def size(self) -> NDArray[Any] | None:
        """Numbers that honest errors are roughly proportional to, of the output's shape. None: to the values"""
        return None


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
class Output:
    """An output of a kernel and what it must be."""

    what: str
    """The function under test, in words."""
    step: str
    """The tap whose cut point has the dtype of the output."""
    found: NDArray[Any]
    """The values to judge, in their own dtype, rows first; only the rows of `call`."""
    call: Call
    reads: tuple[NDArray[Any], ...]
    """The rows that the step reads, of which equal ones err alike: arrays [rows, ...]."""
    where: Callable[[tuple[int, ...]], str]
    """The place of an element of `found`, in words."""
    changes: Callable[[], Iterable[Change]] = lambda: ()
    """The mistakes that a failure is searched for, the likeliest first."""
    cuts: tuple[str, ...] = ()
    """The cut points between the inputs and the output that a kernel may have stored more coarsely."""
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """The arrays that a kernel may have returned in the place of its output, by name."""
    spans: int = 1
    """The number of steps from the inputs to the output."""
    normalises: bool = False
    """Whether one of these steps is a norm."""
    leans: bool = False
    """Whether honest errors may lean toward zero, so that a lean and a factor near 1 name no mistake."""
    cost: int = 0
    """Elements of matrices that a row reads; 0 for a step without a matrix."""
