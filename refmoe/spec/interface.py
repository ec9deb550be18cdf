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
    """The operations that carry the meaning of the arithmetic."""

    def array(self, values: Any) -> Array:
        """The given numbers as an array of this arithmetic."""

    def integers(self, values: Any) -> Array:
        """The given integers as an array that can index or be compared: positions and token ids."""

    def vector(self, weight: Weight) -> Array:
        """A one-dimensional parameter, such as a norm's gain: [n]."""

    def embed(self, table: Weight, ids: Array) -> Array:
        """Rows `ids` [T] of a table [V, D]: [T, D]."""

    def linear(self, x: Array, weight: Weight) -> Array:
        """x [..., n] times the transpose of a parameter [m, n]: [..., m]."""

    def matmul(self, a: Array, b: Array) -> Array:
        """a [..., m, n] times b [..., n, p]: [..., m, p]; leading axes are equal."""

    def sum(self, x: Array, axis: int) -> Array:
        """The sum over one axis, which is dropped."""

    def max(self, x: Array, axis: int) -> Array:
        """The largest element over one axis, which is dropped."""

    def exp(self, x: Array) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + exp(-x))."""

    def unit_circle(self, positions: Array, base: float, numerators: Sequence[int], denominator: int) -> Any:
        """Cosine and sine of the angles ``position * base ** (-numerator / denominator)``, each [T, n].

        One operation, because at position 32768 an angle rounded before its cosine is taken has
        already lost what the cosine is about.
        """

    def where(self, condition: Array, x: Array, otherwise: Array | float) -> Array:
        """x where the condition holds, else `otherwise`."""

    def concatenate(self, arrays: Sequence[Array], axis: int = 0) -> Array: ...

    def top_k(self, x: Array, k: int) -> Array:
        """Indices [T, k] of the k largest of each row of x [T, E], largest first, equal ones by lower index."""

    def gather(self, x: Array, index: Array) -> Array:
        """x[t, index[t, j]] for x [T, E] and integers [T, k]: [T, k]."""

    def group(self, ids: Array, groups: int) -> tuple[Array, list[int]]:
        """The order that sorts integers `ids` [n] stably, [n], and how many there are of each of 0 .. groups - 1."""

    def inverse(self, order: Array) -> Array:
        """The inverse of a permutation [n]."""

    def tap(self, name: str, x: Array) -> Array:
        """Offer a named intermediate to whoever observes; the caller goes on with what is returned."""

    def within(self, prefix: str) -> Ops:
        """The same ops, with `prefix` before the name of every tap."""
