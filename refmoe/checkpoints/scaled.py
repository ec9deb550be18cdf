# SPDX-License-Identifier: Apache-2.0
"""Tensors that are stored as codes with scales, and in some formats with zero points, in several safetensors entries.

    weight[o, i] = scale[o, i] * (code[o, i] - zero[o, i])

One scale serves a group of inputs, a block of rows and inputs, a row, or the whole matrix. The weight is the product as
a real number. Libraries round it to the dtype that they compute in, which is a matter of an engine's arithmetic.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.codes import Factors
from refmoe.checkpoints.layout import whole
from refmoe.checkpoints.rows import Rows, RowTensor, Stored
from refmoe.errors import InputError
from refmoe.files.safetensors_file import StoredTensor
from refmoe.files.sentences import quoted

E4M3, E8M0 = "F8_E4M3", "F8_E8M0"
NARROW = {E4M3: ml_dtypes.float8_e4m3fn, E8M0: ml_dtypes.float8_e8m0fnu}
"""Formats of eight bits: safetensors' names, and NumPy dtypes for their values."""
SCALES = ("F32", "F16", "BF16", E8M0)
"""The dtypes of scales."""
Parts = tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any]]
"""Codes, zero points and scales of some rows, each [n, in]. No zero points: None."""
AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""The place of each of eight columns in a word of AWQ, which interleaves them: AutoAWQ's `order_map`, inverted."""


def stored_bytes(tensor: StoredTensor) -> int:
    """The bytes of a tensor, of a format of eight bits as well."""
    return math.prod(tensor.shape) if tensor.dtype in NARROW else tensor.nbytes


def loaded(tensor: StoredTensor) -> NDArray[Any]:
    """All values of a tensor. Formats of eight bits become float32."""
    if tensor.dtype in NARROW:
        return np.asarray(replace(tensor, dtype="U8").map().view(NARROW[tensor.dtype]), np.float32)
    return tensor.map()


class Codes(ABC):
    """Where the codes of a matrix are."""

    tensor: StoredTensor

    @abstractmethod
    def take(self, rows: Rows) -> NDArray[Any]:
        """The codes of some rows: [n, in], integers or float32."""


@dataclass(frozen=True)
class PlainCodes(Codes):
    """One code an element: int8, or a float of eight bits. [.., out, in]"""

    tensor: StoredTensor

    def take(self, rows: Rows) -> NDArray[Any]:
        narrow, width = self.tensor.dtype in NARROW, self.tensor.shape[-1]
        flat = replace(
            self.tensor, dtype="U8" if narrow else self.tensor.dtype,
            shape=(math.prod(self.tensor.shape[:-1]), width),
        )  # fmt: skip
        first, together = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
        if np.array_equal(rows, np.arange(first, first + together)):
            raw = flat.rows_of(whole)(first, first + together)
        else:
            raw = flat.map()[rows]
        return raw.view(NARROW[self.tensor.dtype]).astype(np.float32) if narrow else raw


@dataclass(frozen=True)
class PackedCodes(Codes):
    """compressed-tensors' `weight_packed`: int32 [out, words], the first input in the lowest bits, above an offset."""

    tensor: StoredTensor
    bits: int
    width: int
    """How many codes a row has."""

    def take(self, rows: Rows) -> NDArray[Any]:
        words = self.tensor.map()[rows]
        return unpacked(words, self.bits)[:, : self.width].astype(np.int16) - np.int16(1 << (self.bits - 1))


@dataclass(frozen=True)
class GptqCodes(Codes):
    """GPTQ's `qweight`: int32 [in bits / 32, out], the first input in the lowest bits."""

    tensor: StoredTensor
    bits: int

    def take(self, rows: Rows) -> NDArray[Any]:
        return unpacked(np.ascontiguousarray(self.tensor.map()[:, rows].T), self.bits)


@dataclass(frozen=True)
class AwqCodes(Codes):
    """AWQ's `qweight`: int32 [in, out / 8], the outputs interleaved."""

    tensor: StoredTensor

    def take(self, rows: Rows) -> NDArray[Any]:
        return awq_columns(self.tensor.map(), rows).T


def unpacked(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The codes of 4 or 8 bits in words of 32, the lowest first: [n, words] to [n, 32 words / bits]."""
    raw = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return raw if bits == 8 else np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)


def awq_columns(words: NDArray[Any], columns: Rows) -> NDArray[Any]:
    """Some columns of a matrix that AWQ has packed: [n, out / 8] to [n, columns]."""
    shifts = 4 * AWQ_PLACES[columns % 8]
    found: NDArray[Any] = words[:, columns // 8] >> shifts.astype(np.int32) & 15
    return found


@dataclass(frozen=True)
class ZeroPoints:
    """Zero points of each row and group."""

    tensor: StoredTensor
    packing: str
    """``"none"``, ``"rows"`` (compressed-tensors), ``"gptq"``, ``"gptq_v1"`` or ``"awq"``."""
    bits: int
    symmetric: bool = False
    """Whether the folder says that each is the middle of the codes."""

    def take(self, rows: Rows, groups: int) -> NDArray[Any]:
        """Zero points of some rows of scales: [n, groups]. Raises InputError where they contradict the folder."""
        stored = self.tensor.map()
        if self.packing == "none":
            return stored.reshape(-1, groups)[rows]
        if self.packing == "awq":
            return awq_columns(stored, rows).T
        per, middle = 32 // self.bits, 1 << (self.bits - 1)
        if self.packing == "rows":
            return (stored[rows // per] >> (self.bits * (rows % per))[:, None].astype(np.int32)) % (
                1 << self.bits
            ) - middle
        found = (stored[:, rows // per] >> (self.bits * (rows % per)).astype(np.int32)).T % (1 << self.bits)
        origin = f"{self.tensor.path}: tensor {quoted(self.tensor.name)}"
        if self.packing == "gptq_v1":
            if (found == (1 << self.bits) - 1).any():
                raise InputError(
                    f"{origin} holds the largest zero point, to which version 1 adds one: engines differ in whether it "
                    f"becomes 0, but a smaller one was expected"
                )
            found = found + 1
        if self.symmetric and (found != middle).any():
            raise InputError(
                f"{origin} holds the zero point {int(found[found != middle][0])}, but {middle} was expected, as 'sym' "
                "says; versions 1 and 2 of GPTQ differ by one"
            )
        return found


@dataclass(frozen=True)
class ScaledTensor(RowTensor):
    """A matrix [out, in], or one for each expert, of codes with scales. `shape` is that of the weights."""

    codes: Codes
    scales: StoredTensor
    """[row blocks, groups], for each expert one after another; GPTQ and AWQ have them transposed."""
    block: tuple[int, int]
    """How many rows and how many inputs share a scale."""
    format: str
    zeros: ZeroPoints | None = None
    groups: StoredTensor | None = None
    """Of each input its group, where inputs are not in order."""
    transposed: bool = False
    beside: tuple[StoredTensor, ...] = ()
    """Other entries that the matrix is stored with."""

    @cached_property
    def grid(self) -> NDArray[Any]:
        """The scales: [all row blocks, groups], float32 or as stored."""
        found = loaded(self.scales)
        if self.transposed:
            return found.T
        blocks = math.prod(self.shape[:-2]) * -(-self.shape[-2] // self.block[0])
        return found.reshape(blocks, -1)

    @cached_property
    def group_of(self) -> Rows:
        """Of each input the number of its group: [in]."""
        width = self.shape[-1]
        if self.groups is None:
            return np.arange(width) // self.block[1]
        found, count = self.groups.map().astype(np.int64), self.grid.shape[1]
        if found.min(initial=0) < 0 or found.max(initial=0) >= count:
            raise InputError(
                f"{self.groups.path}: tensor {quoted(self.groups.name)} has groups from {found.min()} to "
                f"{found.max()}, but numbers from 0 to {count - 1} were expected"
            )
        return found

    def take(self, rows: Rows) -> NDArray[Any]:
        codes, zeros, scales = self.parts(rows, np.float64 if self.dtype == "F64" else np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray((codes if zeros is None else codes - zeros) * scales)

    def factors(self, rows: Rows) -> Factors:
        terms = self.take(rows)
        if self.zeros is None:
            return Factors(terms=terms)
        codes, zeros, scales = self.parts(rows, np.float64)  # engines add up zero points by themselves
        assert zeros is not None
        return Factors(terms=terms, sizes=(np.abs(codes) + np.abs(zeros)) * np.abs(scales))

    def parts(self, rows: Rows, dtype: Any) -> Parts:
        """Codes, zero points and scales of some rows: each [n, in]."""
        height = self.shape[-2]
        blocks = -(-height // self.block[0])
        grid_rows = rows // height * blocks + rows % height // self.block[0]
        zeros = None
        if self.zeros is not None:
            zeros = self.zeros.take(grid_rows, self.grid.shape[1])[:, self.group_of].astype(dtype)
        return self.codes.take(rows).astype(dtype), zeros, self.grid[grid_rows].astype(dtype)[:, self.group_of]

    @property
    def stored(self) -> Stored:
        parts = [self.codes.tensor, self.scales, *self.beside]
        parts += [] if self.zeros is None else [self.zeros.tensor]
        parts += [] if self.groups is None else [self.groups]
        return Stored(
            format=self.format, values=math.prod(self.shape), bits=8 * sum(stored_bytes(each) for each in parts)
        )
