# SPDX-License-Identifier: Apache-2.0
"""Ops on a GPU: the counterparts of `NativeOps` and `ExactOps`. `refmoe.steps.cuda` has the steps for the former.

The classes take the array module as an argument. With NumPy and the CPU runner of the tests they run without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, ArrayOps, StoredWeight, Tap
from refmoe.arithmetic.exact import dot
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.exact.slices import on_host
from refmoe.arithmetic.formats import upcast
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.cuda.device import free_memory, require_exact, require_gpu
from refmoe.cuda.kernels import source
from refmoe.cuda.kernels.calls import Kernels
from refmoe.cuda.kernels.kernel import STORED, GetFunction
from refmoe.spec.experts import Expert

FEW_TOKENS = 4
"""Up to this number of rows, kernels read weights in place, once per row. Above, weights are converted to float32.

A bfloat16 weight costs 2 bytes per row in place. Converting and multiplying it costs 2 + 4 + 4 bytes, once. By that
count both cost the same at 5 rows. Not yet measured.
"""


class CupyOps(ArrayOps):
    """CuPy at float32 or float64; weights stay on the device in their stored dtype."""

    def __init__(
        self,
        xp: Any,
        module: Callable[[str], GetFunction],
        dtype: Any = np.float32,
        tap: Tap | None = None,
        weight_bytes: int = 64 << 30,
        gemm: Callable[..., Array] | None = None,
    ) -> None:
        """xp, module: as of `Kernels`.   weight_bytes: device memory for weights that are kept for later calls.

        gemm: multiplies float32 rows [n, k] by half-precision weights [m, k], perhaps into a given array. It may round
            the rows to the weights' dtype (`refmoe.cuda.gemm`). None: such weights are converted to float32.
        """
        super().__init__(dtype, tap, xp)
        self.kernels = Kernels(xp, module) if self.dtype == np.float32 else None
        self._gemm = gemm if self.dtype == np.float32 else None
        self._weights = WeightCache(weight_bytes)
        self._last_table: dict[str, Any] = {}  # shared by all copies that `within` makes

    # ---- parameters

    def stored(self, weight: StoredWeight) -> Array:
        """A weight on the device: in its stored dtype where the kernels can read it, else at the computing dtype."""

        def upload() -> Array:
            values = weight.read()
            kept = values if str(values.dtype) in STORED else values.astype(self.dtype)
            return self.xp.ascontiguousarray(self.xp.asarray(kept))

        return self._weights.get(weight, upload, lambda array: array.nbytes)

    def stacked(self, experts: tuple[Expert, ...]) -> tuple[Array, Array, Array] | None:
        """w1 and w3 [E, F, D] and w2 [E, D, F] of all experts; None where experts are stored in different dtypes."""

        def upload() -> tuple[Array, Array, Array]:
            first, second, third = ([getattr(e, name).read() for e in experts] for name in ("w1", "w3", "w2"))
            return self._stack(first), self._stack(second), self._stack(third)

        stacks: tuple[Array, Array, Array] = self._weights.get(
            experts, upload, lambda arrays: sum(0 if array is None else array.nbytes for array in arrays)
        )
        return None if any(stack is None or stack.dtype != stacks[0].dtype for stack in stacks) else stacks

    def _stack(self, matrices: Sequence[Array]) -> Array | None:
        """The matrices as one array on the device, uploaded one by one, so that memory holds the stack only once."""
        dtypes = {str(matrix.dtype) for matrix in matrices}
        if len(dtypes) > 1:
            return None
        (dtype,) = dtypes
        stack = self.xp.empty((len(matrices), *matrices[0].shape), matrices[0].dtype if dtype in STORED else self.dtype)
        for i, matrix in enumerate(matrices):
            stack[i] = self.xp.asarray(matrix.astype(stack.dtype, copy=False))
        return stack

    def vector(self, weight: StoredWeight) -> Array:
        return upcast(self.stored(weight), self.dtype)

    def embed(self, table: StoredWeight, ids: Array) -> Array:
        return self.array(table.rows(on_host(ids)))

    def few(self, rows: Array) -> bool:
        """Whether there are so few rows [n, m] that kernels read the weights in place."""
        return len(rows) <= FEW_TOKENS

    def linear(self, x: Array, weight: StoredWeight) -> Array:
        matrix = self.stored(weight)
        rows = x.reshape(-1, x.shape[-1])
        if self.kernels is None or not self.few(rows):
            product = self.xp.empty((len(rows), len(matrix)), self.dtype)
            return self.multiply(rows, matrix, product).reshape(*x.shape[:-1], -1)
        # the kernel treats the weight as the only expert of a model with one expert
        only = self.xp.zeros((len(rows), 1), np.int32)
        product = self.kernels.expert_output(matrix[None], self.xp.ascontiguousarray(rows)[:, None], only)
        return product.reshape(*x.shape[:-1], -1)

    # ---- arithmetic

    def multiply(self, rows: Array, matrix: Array, out: Array) -> Array:
        """out [n, m] = rows [n, k] times the transpose of a stored matrix [m, k] on the device. Returns out."""
        if self._gemm is not None and matrix.dtype != self.dtype:
            return self._gemm(rows, matrix, out)
        out[...] = rows @ upcast(matrix, self.dtype).T
        return out

    def matmul(self, a: Array, b: Array) -> Array:
        return a @ b

    def sum(self, x: Array, axis: int) -> Array:
        return x.sum(axis=axis)

    def exp(self, x: Array) -> Array:
        return self.xp.exp(x)

    def log(self, x: Array) -> Array:
        return self.xp.log(x)

    def sqrt(self, x: Array) -> Array:
        return self.xp.sqrt(x)

    def sigmoid(self, x: Array) -> Array:
        small = self.xp.exp(-self.xp.abs(x))
        return self.xp.where(x >= 0, 1, small) / (1 + small)

    def unit_circle(self, positions: Array, base: float, numerators: Sequence[int], denominator: int) -> Any:
        """Computed on the host in float64, because a device's own sine and cosine may differ in the last bit."""
        key = (base, tuple(numerators), denominator)
        last = self._last_table
        if last.get("positions") is not positions or last.get("key") != key:  # every layer asks for the same table
            exponents = -np.asarray(numerators, dtype=np.float64) / denominator
            angles = on_host(positions)[:, None] * base**exponents
            last.update(positions=positions, key=key, table=(self.array(np.cos(angles)), self.array(np.sin(angles))))
        return last["table"]


@cache
def compiled(file: str) -> GetFunction:
    """The kernels of one file, compiled for the current device when the first of them is launched."""
    cupy = require_gpu()
    module = cupy.RawModule(code=source.text(file), options=source.OPTIONS, name_expressions=source.expressions(file))
    get_function: GetFunction = module.get_function
    return get_function


class Stored:
    """Stored values, on the host or the device, whose rows are chosen by indices on the host."""

    def __init__(self, values: Array, xp: Any) -> None:
        self._values, self._xp, self.shape, self.dtype = values, xp, values.shape, values.dtype

    def __getitem__(self, index: Any) -> Array:
        if isinstance(index, int):
            return on_host(self._values[index])  # for the exact path, which runs on the host
        there = isinstance(index, np.ndarray) and not isinstance(self._values, np.ndarray)
        return self._values[self._xp.asarray(index) if there else index]


class ExactCupyOps(ExactOps):
    """`ExactOps` on a device, with the CPU's bits.

    A device's float64 is IEEE-754 too, and every operation is a separate kernel, so that no two are fused.
    """

    def embed(self, table: StoredWeight, ids: Array) -> Array:
        return self.array(table.rows(on_host(ids)))

    def linear(self, x: Array, weight: StoredWeight) -> Array:
        def prepare() -> dot.PreparedWeight:
            stored: Any = Stored(weight.read(), self.xp)
            return dot.prepare(stored, self.xp)

        return dot.linear(x, self._prepared.get(weight, prepare, lambda made: made.nbytes), self.xp)

    def top_k(self, x: Array, k: int) -> Array:
        # a sort by bits would put -0 before +0; 0.0 - x gives no -0, and otherwise equals -x
        return self.xp.argsort(0.0 - x, axis=-1, kind="stable")[:, :k]


def from_device(tap: Tap | None, xp: Any) -> Tap | None:
    """A tap that receives arrays of the host, and whose replacements are moved to the device."""
    if tap is None:
        return None

    def received(name: str, x: Array) -> Array:
        replacement = tap(name, on_host(x))
        return None if replacement is None else xp.asarray(replacement)

    return received


KEPT = 3, 4
"""The share of the free memory for weights, as a fraction. The rest is for activations and libraries."""


def kept_bytes(free: int) -> int:
    """Device memory for weights that are kept for later calls."""
    return free * KEPT[0] // KEPT[1]


def cupy_ops(dtype: Any = np.float32, tap: Tap | None = None) -> CupyOps:
    """Ops on the current device. Raises InputError, with the reason, where there is none."""
    cupy = require_gpu()
    return CupyOps(cupy, compiled, dtype, tap, weight_bytes=kept_bytes(free_memory(cupy)))


def exact_cupy_ops(tap: Tap | None = None) -> ExactCupyOps:
    """Exact ops on the current device. Raises InputError where there is none, or it would not be exact."""
    cupy = require_gpu()
    require_exact()
    return ExactCupyOps(tap, cupy, kept_bytes(free_memory(cupy)))
