"""What the spec asks of an array and of `ops`.

Plain ``+ - * /``, comparison, indexing and reshaping act on the arrays themselves. Whatever has a
numerical meaning beyond that goes through `Ops`, so that one forward pass serves as fast inference,
golden, ideal low-precision run, set of legal results and proof, by what `ops` it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Array = Any
"""A real-valued array of the kind that `ops` computes with (or integers, where a docstring says so)."""


class Weight(Protocol):
    """A parameter as it is stored: read, converted and perhaps prepared by `ops` when it is used."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Ops(Protocol):
    """The operations that carry the meaning of the arithmetic, each with the shape of what it returns."""

    # real numbers in, an array of this arithmetic out; integers (positions, token ids) that index and compare
    def array(self, values: Any) -> Array: ...
    def integers(self, values: Any) -> Array: ...

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

    def unit_circle(self, positions: Array, base: float, numerators: Sequence[int], denominator: int) -> Any:
        """Cosine and sine of the angles ``position * base ** (-numerator / denominator)``, each [T, n].

        One operation, because at position 32768 an angle rounded before its cosine is taken has
        already lost what the cosine is about.
        """

    def top_k(self, x: Array, k: int) -> Array:
        """Indices [T, k] of the k largest of each row of x [T, E], largest first, equal ones by lower index."""

    # selection: elementwise; along an axis; x[t, index[t, j]] for integers [T, k]: [T, k]
    def where(self, condition: Array, x: Array, otherwise: Array | float) -> Array: ...
    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array: ...
    def gather(self, x: Array, index: Array) -> Array: ...

    def group(self, ids: Array, groups: int) -> tuple[Array, list[int]]:
        """The order that sorts integers `ids` [n] stably, [n], and how many there are of each of 0 .. groups - 1."""

    def inverse(self, order: Array) -> Array:
        """The inverse of a permutation [n]."""

    def tap(self, name: str, x: Array) -> Array:
        """Offer a named intermediate to whoever observes; the caller goes on with what is returned."""

    def within(self, prefix: str) -> Ops:
        """The same ops, with `prefix` before the name of every tap."""
