# SPDX-License-Identifier: Apache-2.0
"""The operations that the spec needs, of an array and of `ops`.

Plain ``+ - * /``, comparison, indexing and reshaping act on the arrays themselves. What depends on an arithmetic goes
through `Ops`. So the same functions compute a golden, a certificate or a fast run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Array(Protocol):
    """An array of the kind that `ops` computes with: real numbers, or integers where a docstring says so."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def T(self) -> Array: ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: object, /) -> Array: ...
    def __setitem__(self, index: object, value: Array, /) -> None: ...

    def __add__(self, other: Array | float, /) -> Array: ...
    def __sub__(self, other: Array | float, /) -> Array: ...
    def __mul__(self, other: Array | float, /) -> Array: ...
    def __truediv__(self, other: Array | float, /) -> Array: ...

    # elementwise comparison, and "and" of booleans
    def __lt__(self, other: Array | float, /) -> Array: ...
    def __ge__(self, other: Array | float, /) -> Array: ...
    def __and__(self, other: Array, /) -> Array: ...

    def reshape(self, *shape: int) -> Array: ...


class Weight(Protocol):
    """A parameter as it is stored. `ops` reads and converts it when it is used."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Ops(Protocol):
    """The operations that carry the meaning of the arithmetic, each with the shape of what it returns."""

    # real numbers to an array of this arithmetic; integers (positions, token ids) to an array that indexes and compares
    def array(self, values: float | Array | Sequence[float]) -> Array: ...
    def integers(self, values: Array | Sequence[int]) -> Array: ...

    def empty(self, *shape: int) -> Array:
        """An array of this shape, to be filled element by element."""

    # parameters: a vector [n]; rows of a table [V, D] for ids [T]: [T, D]; x [..., n] by a matrix [m, n]: [..., m]
    def vector(self, weight: Weight) -> Array: ...
    def embed(self, table: Weight, ids: Array) -> Array: ...
    def linear(self, x: Array, weight: Weight) -> Array: ...

    # a [..., m, n] by b [..., n, p]: [..., m, p]; sum and largest element over one axis, which is dropped
    def matmul(self, a: Array, b: Array) -> Array: ...
    def sum(self, x: Array, axis: int) -> Array: ...
    def max(self, x: Array, axis: int) -> Array: ...

    # elementwise; sigmoid(x) = 1 / (1 + exp(-x))
    def exp(self, x: Array) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def sigmoid(self, x: Array) -> Array: ...

    def unit_circle(
        self, positions: Array, base: float, numerators: Sequence[int], denominator: int
    ) -> tuple[Array, Array]:
        """Cosine and sine of the angles ``position * base ** (-numerator / denominator)``, each [T, n].

        One operation: an angle that is rounded at position 32768 has lost the digits that its cosine needs.
        """

    def top_k(self, x: Array, k: int) -> Array:
        """Indices [T, k] of the k largest of each row of x [T, E], largest first, equal ones by lower index."""

    def distinct(self, ids: Array) -> list[int]:
        """The values that occur among integers, each once, ascending."""

    def where_equal(self, ids: Array, value: int) -> tuple[Array, Array]:
        """The rows and the columns at which integers `ids` [T, k] equal `value`, in order of rows."""

    # selection: elementwise; along an axis; x[t, index[t, j]] for integers [T, k]: [T, k]
    def where(self, condition: Array, x: Array, otherwise: Array | float) -> Array: ...
    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array: ...
    def gather(self, x: Array, index: Array) -> Array: ...

    def tap(self, name: str, x: Array) -> Array:
        """Offer a named intermediate to an observer. The caller goes on with the array that is returned."""

    def within(self, prefix: str) -> Ops:
        """These ops, with `prefix` before the name of every tap."""
