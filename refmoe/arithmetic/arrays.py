# SPDX-License-Identifier: Apache-2.0
"""The base of every array arithmetic: the part of `ops` that moves numbers and computes none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""An array of NumPy or CuPy (of floats, balls or integers), or an enclosure, as the ops at hand compute with.

Docstrings give shapes in the letters of `refmoe.spec`.
"""

Tap = Callable[[str, Any], Any]
"""Called with the full name of a tap and its value. Returns the value to continue with, or None to keep the value."""


class Grid(NamedTuple):
    """The elements of a parameter are integers times one power of two, as is known before they are read."""

    exponent: int
    """Of the power of two."""
    most: int
    """The largest magnitude of the integers."""


class StoredWeight(Protocol):
    """A parameter as ops see it: stored values that can be read whole or, for a table, by rows."""

    grid: Grid | None
    """The grid of all elements, where one is known before they are read."""
    computed: bool
    """Whether the values are computed when they are read, so that there is no file to wait for."""
    most: float | None
    """The largest magnitude of all values, where it is known."""
    read_block: Callable[[int, int], Any] | None
    """Returns rows [start, stop) of a matrix, which may be no numbers. None: they cannot be read without the others."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def read(self) -> Any:
        """All stored values, in the stored dtype."""

    def rows(self, ids: Any) -> Any:
        """Only the rows `ids` of a table, in the stored dtype."""

    def block(self, start: int, stop: int, dtype: Any = None) -> Any:
        """Rows [start, stop) of a matrix that is too large to be held, in the stored dtype or another that holds it."""


class ArrayOps:
    """Selection, ordering and observation, over the array module `xp` at one floating-point dtype.

    Weights are `StoredWeight`s. Arrays are of the kinds that `Array` names.
    """

    def __init__(self, dtype: Any, tap: Tap | None = None, xp: Any = np) -> None:
        """dtype: of every real array.   tap: receives the named intermediate values.   xp: numpy or cupy."""
        self.dtype = np.dtype(dtype)
        self.xp = xp
        self._tap = tap
        self._prefix = ""

    def array(self, values: Any) -> Any:
        return self.xp.asarray(values, dtype=self.dtype)

    def integers(self, values: Any) -> Any:
        return self.xp.asarray(values, dtype=np.int64)

    def empty(self, *shape: int) -> Any:
        return self.xp.empty(shape, self.dtype)

    def vector(self, weight: Any) -> Any:
        return self.array(weight.read())

    # ---- what each arithmetic defines, as `refmoe.spec.interface.Ops` describes it

    def linear(self, x: Any, weight: Any) -> Any:
        raise NotImplementedError

    def matmul(self, a: Any, b: Any) -> Any:
        raise NotImplementedError

    def product(self, step: str, a: Any, b: Any) -> Any:
        """`matmul`, as the step of this name."""
        return self.matmul(a, b)

    def sum(self, x: Any, axis: int) -> Any:
        raise NotImplementedError

    def exp(self, x: Any) -> Any:
        raise NotImplementedError

    def log(self, x: Any) -> Any:
        """The natural logarithm."""
        raise NotImplementedError

    def sqrt(self, x: Any) -> Any:
        raise NotImplementedError

    def sigmoid(self, x: Any) -> Any:
        raise NotImplementedError

    def unit_circle(self, positions: Any, base: float, numerators: Sequence[int], denominator: int) -> Any:
        raise NotImplementedError

    # ---- parameters and selection

    def embed(self, table: Any, ids: Any) -> Any:
        return self.array(table.rows(ids))

    def max(self, x: Any, axis: int) -> Any:
        return x.max(axis=axis)

    def where(self, condition: Any, x: Any, otherwise: Any) -> Any:
        return self.xp.where(condition, x, self.array(otherwise))

    def concatenate(self, arrays: Sequence[Any], axis: int = 0) -> Any:
        return self.xp.concatenate(arrays, axis=axis)

    def top_k(self, x: Any, k: int) -> Any:
        return self.xp.argsort(-x, axis=-1, kind="stable")[:, :k]

    def distinct(self, ids: Any) -> list[int]:
        return sorted(set(ids.reshape(-1).tolist()))

    def where_equal(self, ids: Any, value: int) -> Any:
        return (ids == value).nonzero()

    def gather(self, x: Any, index: Any) -> Any:
        return self.xp.take_along_axis(x, index, axis=-1)

    def remembered(self, x: Any) -> Any:
        """Keys or values of new tokens, as they are cached. x: [T, K, d]"""
        return x

    def at_any_offset(self, turned: Any, x: Any, table: tuple[Any, Any]) -> Any:
        """`turned`, which is x after a rotation, of an engine that may count positions from another start."""
        return turned

    def group(self, ids: Any, groups: int) -> tuple[Any, list[int]]:
        """The order [n] that sorts integers `ids` [n] stably, and the number of ids equal to 0, 1, .. groups - 1."""
        return self.xp.argsort(ids, kind="stable"), self.xp.bincount(ids, minlength=groups).tolist()

    def inverse(self, order: Any) -> Any:
        """The inverse of a permutation [n]."""
        inverted = self.xp.empty_like(order)
        inverted[order] = self.xp.arange(len(order))
        return inverted

    def placed(self, parts: Sequence[Any], order: Any) -> Any:
        """The rows of several arrays, one array after the other, of which row i goes to place order[i]: [n, m]"""
        return self.concatenate(parts)[self.inverse(order)]

    @property
    def watched(self) -> bool:
        """Whether a tap is set."""
        return self._tap is not None

    def tap(self, name: str, x: Any) -> Any:
        if self._tap is None:
            return x
        replacement = self._tap(self._prefix + name, x)
        return x if replacement is None else replacement

    def within(self, prefix: str) -> Self:
        inner = object.__new__(type(self))
        inner.__dict__.update(self.__dict__)  # a copy in a tenth of the time of copy.copy
        inner._prefix = self._prefix + prefix
        return inner
