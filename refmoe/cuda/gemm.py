# SPDX-License-Identifier: Apache-2.0
"""Matrix products at the dtype that weights are stored in, with float32 sums: cuBLAS's `gemmEx`.

CuPy's own `matmul` rounds a bfloat16 product to bfloat16, and cannot multiply stacks of bfloat16 matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array

HALVES = ("bfloat16", "float16")
"""Stored dtypes whose products cuBLAS sums in float32."""


class Gemm:
    """Products of float32 rows by stored weights, the rows rounded to the weights' dtype."""

    def __init__(self, xp: Any, cublas: Any, handle: Any, types: dict[str, int]) -> None:
        """xp: cupy.   cublas: CuPy's binding.   handle: returns the current handle.   types: cudaDataType by dtype."""
        self._xp, self._cublas, self._handle, self._types = xp, cublas, handle, types
        # cuBLAS reads these scalar factors from the host when it is called
        self._one, self._zero = np.array(1, np.float32), np.array(0, np.float32)

    def __call__(self, rows: Array, weight: Array, out: Array | None = None) -> Array:
        """rows times the transpose of the weight.

        rows: float32 [n, k]   weight: [m, k], contiguous   out: float32 [n, m], contiguous   returns: out
        """
        stored = str(weight.dtype)
        if stored not in self._types or not weight.flags.c_contiguous:
            raise ValueError(f"a weight of {stored} that is contiguous was expected to be one of {', '.join(HALVES)}")
        (n, k), m = rows.shape, len(weight)
        if out is None:
            out = self._xp.empty((n, m), np.float32)
        narrow = self._xp.ascontiguousarray(rows.astype(weight.dtype))
        if not n or not m:
            return out
        # read as column-major, the call computes out^T [m, n] = (weight^T)^T [m, k] times rows^T [k, n]
        blas, kind, single = self._cublas, self._types[stored], self._types["float32"]
        blas.gemmEx(
            self._handle(), blas.CUBLAS_OP_T, blas.CUBLAS_OP_N, m, n, k, self._one.ctypes.data, weight.data.ptr, kind,
            k, narrow.data.ptr, kind, k, self._zero.ctypes.data, out.data.ptr, single, m, blas.CUBLAS_COMPUTE_32F,
            blas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
        return out


def cuda_gemm(cupy: Any) -> Gemm:
    """The products on the current device."""
    from cupy.cuda import cublas, device, runtime

    types = {"bfloat16": runtime.CUDA_R_16BF, "float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F}
    return Gemm(cupy, cublas, device.get_cublas_handle, types)
