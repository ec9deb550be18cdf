# SPDX-License-Identifier: Apache-2.0
"""One parameter: where its values come from, and the check that they are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.arithmetic.arrays import Grid
from refmoe.arithmetic.formats import OF_DTYPE, largest, upcast
from refmoe.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _read_only(source: Callable[[], Any]) -> Any:
    values = source()
    values.flags.writeable = False
    return values


class Weight:
    """A parameter that is read when it is used. The first read checks that all values are finite."""

    grid: Grid | None = None
    computed = False
    most: float | None = None
    """The largest magnitude of all values, once `read` has seen them."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: Any, source: Callable[[], Any], origin: str,
        read_block: Callable[[int, int], Any] | None = None,
    ) -> None:  # fmt: skip
        """name: the canonical name.   source: returns the stored values.   origin: file and tensor, for messages.

        read_block: returns rows [start, stop) of the stored values, if it can do so without reading the others. It does
        not check them.
        """
        self.name = name
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.origin = origin
        self._source = source
        self.read_block = read_block
        self._checked = False

    def hold(self) -> None:
        """Keep the values of the first call of `read`, read-only, for the later ones."""
        self._source = cache(partial(_read_only, self._source))

    def read(self) -> Any:
        """All values, in the stored dtype. Raises InputError when one is NaN or infinite."""
        stored = self._source()
        if not self._checked:
            self.most = self._check(stored)
            self._checked = True
        return stored

    def rows(self, ids: Any) -> Any:
        """Rows `ids` only. Raises InputError when one of their values is NaN or infinite."""
        stored = self._source()[ids]
        self._check(stored)
        return stored

    def block(self, start: int, stop: int, dtype: Any = None) -> Any:
        """Rows [start, stop) of a matrix that is too large to be held, as an array of their own.

        dtype: float32 or float64, which must hold all stored values; None: the stored dtype

        Raises InputError when one of their values is NaN or infinite, or the file can no longer be read.
        """
        if self.read_block is None:
            stored = self.rows(slice(start, stop))
        else:
            stored = self.read_block(start, stop)
            self._check(stored)
        return stored if dtype is None else upcast(stored, np.dtype(dtype))

    def _check(self, stored: Any) -> float | None:
        """Raise InputError when a value is NaN or infinite. Returns the largest magnitude, if that is found on the way.

        stored: floats, or integers
        """
        most = largest(stored) if stored.dtype in OF_DTYPE else None
        if np.isfinite(stored).all() if most is None else math.isfinite(most):
            return most
        bad = stored[~np.isfinite(stored.astype(np.float64))]
        raise InputError(
            f"{self.origin} holds {bad.size} value{'s' * (bad.size != 1)} that "
            f"{'are' if bad.size != 1 else 'is'} not finite (the first is {float(bad[0])}), "
            "but every weight must be a number"
        )
