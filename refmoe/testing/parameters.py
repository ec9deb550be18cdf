# SPDX-License-Identifier: Apache-2.0
"""Arrays of a call as the steps read them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.arrays import Grid
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import OF_DTYPE, upcast
from refmoe.steps.enclosure_ops import EnclosureOps


class Matrix:
    """A matrix of parameters in memory, as `refmoe.arithmetic.arrays.StoredWeight`. Its values may be anything."""

    grid: Grid | None = None
    computed = False
    most: float | None = None
    read_block: Any = None
    origin = "a matrix of the call"

    def __init__(self, name: str, values: NDArray[Any]) -> None:
        """name: the canonical name, which tells the product; empty for one of no step   values: [rows, columns]"""
        self.name, self.values = name, values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def read(self) -> NDArray[Any]:
        return self.values

    def rows(self, ids: Any) -> NDArray[Any]:
        found: NDArray[Any] = self.values[ids]
        return found

    def block(self, start: int, stop: int, dtype: Any = None) -> NDArray[Any]:
        part = self.values[start:stop]
        return part if dtype is None else upcast(part, np.dtype(dtype))


def known(ops: EnclosureOps, values: NDArray[Any], roundings: int = 0) -> Enclosure:
    """An input of the kernel, which is known exactly. An infinity or NaN in it may make others.

    A kernel that computes in a narrower dtype than that of the array may round it first.
    roundings: of a value that a kernel with a mistake computes from its input
    """
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        ops.events.append("input")
    accumulation = ops.policy.accumulation
    if not roundings:
        x = Enclosure(wide, accumulation=accumulation)
        return x if accumulation.holds(OF_DTYPE[values.dtype]) else x.cut(accumulation)
    moved = roundings * accumulation.u * np.abs(wide)
    return Enclosure(wide, moved, moved**2 / 3, accumulation=accumulation)
