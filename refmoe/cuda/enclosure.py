# SPDX-License-Identifier: Apache-2.0
"""The verifier's ops with their products by weights on a GPU, which are most of the work.

The rules bound the error of float64 sums in any order, and of fused products, so they hold on a GPU too.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from refmoe.arithmetic.arrays import Array, StoredWeight, Tap
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.matrices import Matrix
from refmoe.arithmetic.enclosure.products import Accumulator, product
from refmoe.arithmetic.exact import dot
from refmoe.arithmetic.exact.slices import on_host
from refmoe.arithmetic.formats import Format, nearest, representable
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps


class Factor:
    """A matrix [n, m] on a device, as the right factor of products with host arrays, whose results are on the host."""

    __array_ufunc__ = None  # so that NumPy leaves `x @ factor` to this class

    def __init__(self, values: Array, xp: Any) -> None:
        self.values, self.xp = values, xp

    def __getitem__(self, index: Any) -> Factor:
        return Factor(self.values[index], self.xp)

    def __rmatmul__(self, x: Array) -> Array:
        """x: [..., n], on the host   returns: [..., m], on the host"""
        rows = self.xp.asarray(np.ascontiguousarray(x).reshape(-1, x.shape[-1]))
        return on_host(rows @ self.values).reshape(*x.shape[:-1], -1)

    def max(self, initial: float) -> float:
        return max(initial, float(self.values.max())) if self.values.size else initial


class DeviceMatrix(Matrix):
    """A `Matrix` of a stored weight, on a device; its elements are finite."""

    mid: Any
    size: Any
    square: Any

    def __init__(self, values: Array, held: Format, xp: Any) -> None:
        """values: float64 [n, m] on the host   held: a format that holds all elements"""
        self.xp = xp
        there = xp.asarray(np.ascontiguousarray(values))
        self.mid, self.size, self.square = (Factor(part, xp) for part in (there, xp.abs(there), there * there))
        self.radius = self.variance = self.length = None
        self._below: dict[float, Any] = {}
        self._fits = {held: True}

    @property
    def nbytes(self) -> int:
        return int(7 * self.mid.values.nbytes // 2)  # three float64 matrices, and the signs in float32 if asked for

    @property
    def signs(self) -> Any:
        """The signs in float32. They are not kept, as only truncating accumulators ask for them."""
        return Factor(self.xp.sign(self.mid.values).astype(np.float32), self.xp)

    def below(self, tiny: float) -> Factor | None:
        if tiny not in self._below:
            size = self.size.values
            small = self.xp.where(size < tiny, size, 0.0)
            self._below[tiny] = Factor(small, self.xp) if small.any() else None
        found: Factor | None = self._below[tiny]
        return found

    def lacking(self, tiny: float) -> Factor | None:
        small = self.below(tiny)
        if small is None:
            return None
        return Factor(self.xp.where(small.values > 0, tiny - small.values, 0.0), self.xp)

    def fits(self, format: Format) -> bool:
        if format not in self._fits:
            self._fits[format] = bool(representable(on_host(self.mid.values), format).all())
        return self._fits[format]


def is_finite(x: Enclosure) -> bool:
    """Whether value, radius and variance of every element are finite."""
    return all(part is None or bool(np.isfinite(part).all()) for part in (x.mid, x.radius, x.variance))


class EnclosureCupyOps(EnclosureOps):
    """`EnclosureOps` that multiplies by weights on a device; on the host where an element of x has no finite bound."""

    def __init__(self, policy: Policy, tap: Tap | None = None, *, xp: Any, device_bytes: int) -> None:
        """device_bytes: device memory for weights that are kept for later calls."""
        super().__init__(policy, tap)
        self._device = xp
        self._on_device = WeightCache(device_bytes)

    def share_weights(self, other: Self) -> None:
        super().share_weights(other)
        self._on_device = other._on_device

    def times_weight(self, x: Enclosure, weight: StoredWeight, how: Accumulator) -> Enclosure:
        x = x.settle()
        if how is not self._products or not is_finite(x):
            return super().times_weight(x, weight, how)
        xp = self._device

        def prepare() -> tuple[DeviceMatrix, Any]:
            held = self.policy.at("weights")
            values = np.asarray(nearest(weight.read(), held), np.float64)
            return DeviceMatrix(values.T, held, xp), dot.prepare(values, xp) if self._exact else None

        def nbytes(made: tuple[DeviceMatrix, Any]) -> int:
            return made[0].nbytes + (made[1].nbytes if self._exact else 0)

        matrix, prepared = self._on_device.get(weight, prepare, nbytes)
        exact = on_host(dot.linear(xp.asarray(x.mid), prepared, xp)) if self._exact else None
        return self._watch("linear", product(x, matrix, how, exact), how.format)
