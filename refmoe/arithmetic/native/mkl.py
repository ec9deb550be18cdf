# SPDX-License-Identifier: Apache-2.0
"""Intel's oneMKL through its CBLAS: products with a weight that was packed beforehand (extra ``mkl``).

A BLAS first brings both factors into the order in which its kernel reads them, and then multiplies. For an expert with
few tokens, ordering the weight takes a large part of the time; `gemm_pack` does it once per weight. The calls go
through ctypes, which releases Python's lock. Source: Intel, oneMKL Developer Reference for C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, c_double, c_float, c_int, c_size_t, c_void_p
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.errors import InputError

ROW_MAJOR, PLAIN, TRANSPOSED, PACKED, SECOND_FACTOR = 101, 111, 112, 151, 162
"""Values of CBLAS's enumerations."""
INTEGERS_OF_32_BITS = 0
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PACKED_FOR = 256
"""Rows of the other factor that a weight is packed for. Any number is allowed; this one selects wide tiles."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Packed:
    """A matrix [m, n] in the library's own order."""

    shape: tuple[int, int]
    dtype: Any
    buffer: Array
    """The bytes, which must not move."""
    address: int
    """Address of the buffer. Asking NumPy for it at each product takes as long as the rest of the call."""


class Routines:
    """The library's functions for matrices of one dtype."""

    def __init__(self, library: CDLL, name: str, real: Any) -> None:
        """name: of the product, as in CBLAS.   real: the C type of its scalars."""
        matrix = [c_void_p, c_int]  # an address, and the elements from one row to the next
        late = name.endswith(
            "f32"
        )  # such a product takes its scalar factor when it computes, the others when they pack
        of_pack, of_compute = ([], [real]) if late else ([real], [])
        self.product = declared(library, name, 6, [real, *matrix, *matrix, real, *matrix])
        self.size = declared(library, f"{name}_pack_get_size", 4, [], c_size_t)
        self.pack = declared(library, f"{name}_pack", 6, [*of_pack, *matrix, c_void_p])
        self.compute = declared(library, f"{name}_compute", 6, [*of_compute, *matrix, *matrix, real, *matrix])
        self.factor_of_pack, self.factor_of_compute = (1,) * len(of_pack), (1,) * len(of_compute)


def declared(library: CDLL, name: str, integers: int, rest: list[Any], result: Any = None) -> Any:
    """A function of the library, with its argument types: some integers first, then the rest."""
    function = getattr(library, f"cblas_{name}")
    function.argtypes, function.restype = [c_int] * integers + rest, result
    return function


class Mkl:
    """Products of two matrices of one dtype: float32, float64, or bfloat16, whose products are float32."""

    def __init__(self, path: str) -> None:
        """path: of the library `mkl_rt`. Raises OSError where it cannot be loaded."""
        self._library = CDLL(path)
        self._library.MKL_Set_Interface_Layer(INTEGERS_OF_32_BITS)
        self._routines = {
            np.dtype(np.float32): Routines(self._library, "sgemm", c_float),
            np.dtype(np.float64): Routines(self._library, "dgemm", c_double),
            BFLOAT16: Routines(self._library, "gemm_bf16bf16f32", c_float),
        }

    def set_threads(self, count: int) -> None:
        """Set the number of threads that compute a product."""
        self._library.MKL_Set_Num_Threads(count)

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Within this context, products that the calling thread asks for are computed by that thread alone."""
        before = self._library.MKL_Set_Num_Threads_Local(1)
        try:
            yield
        finally:
            self._library.MKL_Set_Num_Threads_Local(before)

    def product(self, x: Array, matrix: Array, out: Array) -> None:
        """x times the transpose of the matrix. x: [T, n]   matrix: [m, n]   out: [T, m], dense in each row"""
        x, matrix = with_dense_rows(x), with_dense_rows(matrix)
        check(x, matrix, out)
        sizes, at, weight = (len(x), *matrix.shape), x.ctypes.data, matrix.ctypes.data
        product = self._routines[x.dtype].product
        result = out.ctypes.data
        product(ROW_MAJOR, PLAIN, TRANSPOSED, *sizes, 1, at, step(x), weight, step(matrix), 0, result, step(out))

    def pack(self, matrix: Array) -> Packed:
        """The matrix [m, n] for `packed_product`."""
        matrix = with_dense_rows(matrix)
        call, sizes = self._routines[matrix.dtype], (PACKED_FOR, *matrix.shape)
        room = np.empty(call.size(SECOND_FACTOR, *sizes) + ALIGNMENT, np.uint8)
        buffer = room[-room.ctypes.data % ALIGNMENT :]
        source = (*call.factor_of_pack, matrix.ctypes.data, step(matrix))
        call.pack(ROW_MAJOR, SECOND_FACTOR, TRANSPOSED, *sizes, *source, buffer.ctypes.data)
        return Packed(matrix.shape, matrix.dtype, buffer, buffer.ctypes.data)

    def packed_product(self, x: Array, packed: Packed, out: Array) -> None:
        """x times the transpose of the matrix that was packed. x: [T, n]   out: [T, m], dense in each row"""
        x = with_dense_rows(x)
        check(x, packed, out)
        call, (m, n) = self._routines[x.dtype], packed.shape
        factors = (*call.factor_of_compute, x.ctypes.data, step(x), packed.address, n)
        call.compute(ROW_MAJOR, PLAIN, PACKED, len(x), m, n, *factors, 0, out.ctypes.data, step(out))


def check(x: Array, weight: Array | Packed, out: Array) -> None:
    """Raises TypeError or ValueError where the library would read or write outside the arrays."""
    result = np.float64 if x.dtype == np.float64 else np.float32
    if x.dtype != weight.dtype or out.dtype != result:
        raise TypeError(f"a product of {x.dtype} and {weight.dtype} as {out.dtype}")
    (m, n), dense = weight.shape, out.size == 0 or out.strides[1] == out.itemsize
    if x.shape[1] != n or out.shape != (len(x), m) or not dense:
        raise ValueError(f"a product of {x.shape} and the transpose of {weight.shape} as {out.shape}")


def with_dense_rows(array: Array) -> Array:
    """The array, or a copy of one whose rows go backwards or have gaps between their elements."""
    return array if array.strides[1] == array.itemsize and array.strides[0] >= 0 else np.ascontiguousarray(array)


def step(array: Array) -> int:
    """Elements from one row to the next. (For a single row, NumPy's stride can be any number.)"""
    return max(int(array.strides[0]) // int(array.itemsize), int(array.shape[1]))


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has units for products of bfloat16 matrices (AMX)."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@cache
def load_mkl() -> Mkl:
    """The library that the package `mkl` installs, or else the system's. Raises InputError where there is none."""
    try:
        installed = [str(file.locate()) for file in files("mkl") or () if file.name.startswith("libmkl_rt.so")]
    except PackageNotFoundError:
        installed = []
    for path in filter(None, [*installed, find_library("mkl_rt")]):
        try:
            return Mkl(path)
        except OSError as error:
            raise InputError(f"oneMKL cannot be loaded: {error}") from None
    raise InputError(
        "oneMKL needs the package 'mkl', which is not installed: pip install 'refmoe[mkl]' (Linux on x86-64 only)"
    )
