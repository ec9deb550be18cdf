# SPDX-License-Identifier: Apache-2.0
"""Native ops whose products are oneMKL's, with packed weights, and with weights in bfloat16 read as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from math import prod
from threading import Lock, local
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, StoredWeight, Tap
from refmoe.arithmetic.native.lanes import lanes
from refmoe.arithmetic.native.mkl import BFLOAT16, Packed, load_mkl, multiplies_bfloat16
from refmoe.arithmetic.native.ops import SIDE_BY_SIDE, UPCAST_BYTES, NativeOps, Part

SLICES = 3
"""bfloat16 has 8 significant bits, float32 has 24."""
LARGE, TALL = 1 << 22, 3
"""Elements of a weight, and its ratio of rows to columns, from which slices are faster for many rows too (measured)."""


class PackedWeights:
    """Parts of weights, packed, while there is room for them.

    Packing takes as long as one or two products. No part is ever dropped for another, as a model uses all in turn.
    """

    def __init__(self, limit: int) -> None:
        """limit: bytes."""
        self.left = limit
        self._entries: dict[Any, tuple[Sequence[Part], Packed | None]] = {}
        self._lock = Lock()  # lanes ask for parts in parallel

    def get(self, parts: Sequence[Part], kind: Any, pack: Callable[[], Packed]) -> Packed | None:
        """The parts packed as one matrix; None at the first request for them, and when there is no room.

        kind: dtype and threading, on which the packed order depends too.
        An entry holds the weights themselves, so that their ids are not reused while they are in a key.
        """
        key = (kind, *((id(p.weight), p.rows.start, p.rows.stop, p.columns.start, p.columns.stop) for p in parts))
        known = self._entries.get(key)
        if known is not None and known[1] is not None:
            return known[1]
        if self.left <= 0:
            return None
        packed = pack() if known else None
        with self._lock:
            size = packed.buffer.nbytes if packed else 0
            if size > self.left:
                self.left = 0
                return None
            self.left -= size
            self._entries[key] = parts, packed
        return packed


class Ready:
    """A float32 factor of several products, whose slices are computed once."""

    def __init__(self, array: Array) -> None:
        """array: [T, n]"""
        self.array = array

    @cached_property
    def slices(self) -> Array:
        """Three bfloat16 arrays that sum to the factor exactly: [3, T, n], the smallest first."""
        return sliced(self.array)

    def __len__(self) -> int:
        return len(self.array)


def sliced(x: Array) -> Array:
    """Three arrays that sum to x exactly, the smallest first. x: float32 [T, n]   returns: bfloat16 [3, T, n]"""
    slices = np.empty((SLICES, *x.shape), BFLOAT16)
    slices[2] = x
    rest = x - slices[2]
    slices[1] = rest
    rest -= slices[1]
    slices[0] = rest
    return slices


class Workspace(local):
    """Memory of a thread that is used again and again: allocating it costs more than the computation in it."""

    room = np.empty(0, np.float32)

    def array(self, *shape: int) -> Array:
        """A float32 array, valid until the next one is asked for."""
        size = prod(shape)
        if size > self.room.size:
            self.room = np.empty(size, np.float32)
        return self.room[:size].reshape(shape)


class MklOps(NativeOps):
    """`NativeOps` with oneMKL for products with a weight.

    Where the processor multiplies bfloat16 matrices, a weight stored in bfloat16 is used as it is stored, not converted
    to twice its size. Each float32 is the sum of three bfloat16 numbers, whose products with the weight are added in
    float32. (A float32 beyond the largest bfloat16, 3.39e38, is no such sum and gives NaN.)
    """

    def __init__(
        self, dtype: Any = np.float64, tap: Tap | None = None, upcast_bytes: int = UPCAST_BYTES,
        packed_bytes: int = UPCAST_BYTES,
    ) -> None:  # fmt: skip
        """packed_bytes: memory for packed weights, in addition to `upcast_bytes`. Raises InputError without oneMKL."""
        super().__init__(dtype, tap, upcast_bytes)
        self._mkl = load_mkl()
        self._mkl.set_threads(lanes().count)
        self._packed = PackedWeights(packed_bytes)
        self._workspace = Workspace()
        self._slices = self.dtype == np.float32 and multiplies_bfloat16()

    def ready(self, x: Any) -> Any:
        return Ready(x) if self._slices else x

    def linear(self, x: Any, weight: StoredWeight) -> Any:
        if len(x) >= SIDE_BY_SIDE or not self._by_slices(len(x), weight):
            return super().linear(x, weight)
        out = np.empty((len(x), weight.shape[0]), self.dtype)
        self.multiply(x, (Part(weight),), out)
        return out

    def multiply(self, x: Any, parts: Sequence[Part], out: Any) -> None:
        by_slices = all(self._by_slices(len(x), part.weight) for part in parts)
        if not by_slices and (len(x) < SIDE_BY_SIDE or any(self.streams(part.weight) for part in parts)):
            super().multiply(x.array if isinstance(x, Ready) else x, parts, out)
            return
        alone = len(x) >= SIDE_BY_SIDE or lanes().busy > 1
        with self._mkl.one_thread() if alone else nullcontext():
            if by_slices:
                self._add_slices(x.slices if isinstance(x, Ready) else sliced(x), parts, out, alone)
            else:
                self._product(x.array if isinstance(x, Ready) else x, parts, self.matrix, out, alone)

    def hold(self, weight: StoredWeight, rows: int) -> None:
        if not self._by_slices(rows, weight):
            super().hold(weight, rows)

    def _by_slices(self, rows: int, weight: StoredWeight) -> bool:
        """Whether to multiply by slices: the weight is bfloat16 and slices are faster.

        The time of few rows is that of reading the weight; of many rows, that of slicing and adding.
        """
        m, n = weight.shape
        worth = rows < SIDE_BY_SIDE or m * n >= LARGE or m >= TALL * n
        return self._slices and weight.dtype == BFLOAT16 and worth

    def _add_slices(self, slices: Array, parts: Sequence[Part], out: Array, alone: bool) -> None:
        """The sum of the three products. slices: [3, T, n]   out: [T, m]"""
        terms = self._workspace.array(SLICES * len(out), out.shape[1])
        self._product(slices.reshape(-1, slices.shape[-1]), parts, lambda weight: weight.read(), terms, alone)
        low, middle, high = terms.reshape(SLICES, *out.shape)
        np.add(low, middle, out=out)
        out += high

    def _product(self, x: Array, parts: Sequence[Part], read: Callable[[Any], Array], out: Array, alone: bool) -> None:
        """x times the transposes of the parts, packed where that is possible.

        x: [T, n]   read: a weight's values at the dtype of x   out: [T, m]   alone: whether by this thread only
        """

        def matrices() -> list[Array]:
            return [read(part.weight)[part.rows, part.columns] for part in parts]

        packed = self._packed.get(parts, (x.dtype, alone), lambda: self._mkl.pack(joined(matrices())))
        if packed is not None:
            self._mkl.packed_product(x, packed, out)
            return
        start = 0
        for matrix in matrices():
            self._mkl.product(x, matrix, out[:, start : start + len(matrix)])
            start += len(matrix)


def joined(matrices: list[Array]) -> Array:
    """The matrices one below the other. A single matrix is not copied."""
    return matrices[0] if len(matrices) == 1 else np.concatenate(matrices)
