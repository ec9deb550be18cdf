# SPDX-License-Identifier: Apache-2.0
"""The block formats of GGUF, as the numbers that they define.

A block of bytes holds integer codes, a scale for each group of them, and in some formats an offset for each group:

    weight = scale * code + offset

No product here rounds: a scale has at most 19 bits, and a code at most 8. The layouts are those of ggml
(`ggml/src/ggml-common.h` and `ggml-quants.c` in llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.codes import Factors

Bytes = NDArray[np.uint8]
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""The values of a four-bit float, doubled."""


@dataclass(frozen=True)
class Groups:
    """The parts of n blocks."""

    codes: NDArray[np.integer[Any]]
    """[n, groups, size]"""
    scales: NDArray[np.float32]
    """[n, groups]"""
    offsets: NDArray[np.float32] | None = None
    """[n, groups]; None where the format has none."""

    def values(self) -> NDArray[np.float32]:
        """The weights: float32 [n, groups size].

        Raises ValueError when a sum of product and offset is no float32: engines differ in how they round it.
        """
        made = self.codes.astype(np.float32)
        made *= self.scales[..., None]
        if self.offsets is None:
            return made.reshape(len(made), -1)
        made += self.offsets[..., None]
        # all are multiples of 2^-24, the smallest float16, so that up to 1 a float32 holds each sum
        if not np.abs(made).max(initial=0.0) <= 1:
            exact = self.codes * self.scales[..., None].astype(np.float64) + self.offsets[..., None]
            other = np.argwhere((exact != made) & np.isfinite(exact))
            if len(other):
                place = tuple(other[0])
                scale, offset = self.scales[place[:2]], self.offsets[place[:2]]
                raise ValueError(f"the code {self.codes[place]} with scale {scale:g} and offset {offset:g}")
        return made.reshape(len(made), -1)


@dataclass(frozen=True)
class BlockFormat:
    """A format: how many weights a block has, in how many bytes, and what the bytes mean."""

    name: str
    size: int
    nbytes: int
    parts: Callable[[Bytes], Groups]
    """From blocks [n, nbytes] to their parts."""
    unsigned: int = 0
    """The number that kernels add to codes, which they multiply unsigned, and subtract in sums of other codes.

    Those of Q6_K for x86 do so (`ggml_vec_dot_q6_K_q8_K`). Those of Q4_0 and Q5_0 subtract it from each code.
    """

    def values(self, raw: Bytes) -> NDArray[np.float32]:
        """The weights of blocks [n, nbytes]: float32 [n, size]; not finite where a scale is not.

        Raises ValueError as `Groups.values` does.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self.parts(raw).values()

    def factors(self, raw: Bytes) -> Factors:
        """The weights of blocks [n, nbytes] as engines multiply them: [n, size], offsets [n, groups]."""
        with np.errstate(over="ignore", invalid="ignore"):
            groups = self.parts(raw)
            scales = groups.scales[..., None]
            terms = (groups.codes * scales).reshape(len(raw), -1)
            sizes = None
            if self.unsigned:
                most = np.abs(groups.codes).astype(np.float64) + self.unsigned  # times a scale it may need 25 bits
                sizes = (most * np.abs(scales)).reshape(terms.shape)
        return Factors(terms=terms, offsets=groups.offsets, sizes=sizes)

    @property
    def bits(self) -> float:
        """The bits of a weight, with its share of scales and offsets."""
        return 8 * self.nbytes / self.size


def half(raw: Bytes) -> NDArray[np.float32]:
    """Float16 numbers: [n, 2 k] to [n, k]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """The low halves of all bytes, and then the high ones: [.., k] to [.., 2 k]."""
    return np.concatenate([raw & 15, raw >> 4], axis=-1)


def _bits(raw: Bytes) -> Bytes:
    """Single bits as bytes, the lowest first: [.., k] to [.., 8 k]."""
    found: Bytes = np.unpackbits(raw, axis=-1, bitorder="little")
    return found


def _q8_0(b: Bytes) -> Groups:
    return Groups(b[:, None, 2:].view(np.int8), half(b[:, :2]))


def _q4_0(b: Bytes) -> Groups:
    return Groups(_nibbles(b[:, None, 2:]).view(np.int8) - np.int8(8), half(b[:, :2]))


def _q4_1(b: Bytes) -> Groups:
    return Groups(_nibbles(b[:, None, 4:]), half(b[:, :2]), half(b[:, 2:4]))


def _q5_0(b: Bytes) -> Groups:
    codes = _nibbles(b[:, None, 6:]) | _bits(b[:, None, 2:6]) << 4
    return Groups(codes.view(np.int8) - np.int8(16), half(b[:, :2]))


def _q5_1(b: Bytes) -> Groups:
    codes = _nibbles(b[:, None, 8:]) | _bits(b[:, None, 4:8]) << 4
    return Groups(codes, half(b[:, :2]), half(b[:, 2:4]))


def six_bits(raw: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and the eight mins of six bits in 12 bytes: [n, 12] to [n, 8] each."""
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return scales, mins


def _k_groups(b: Bytes, codes: Bytes) -> Groups:
    """Codes [n, 8, 32] with the scales and mins that Q4_K and Q5_K have in common."""
    scales, mins = six_bits(b[:, 4:16])
    return Groups(codes, half(b[:, :2]) * scales, -(half(b[:, 2:4]) * mins))


def _low_of_k(raw: Bytes) -> Bytes:
    """Pairs of groups of 32 share 32 bytes: [n, 128] to [n, 8, 32]."""
    return _nibbles(raw.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q4_k(b: Bytes) -> Groups:
    return _k_groups(b, _low_of_k(b[:, 16:]))


def _q5_k(b: Bytes) -> Groups:
    high = _bits(b[:, 16:48, None]).swapaxes(1, 2)  # bit g of byte i belongs to code i of group g
    return _k_groups(b, _low_of_k(b[:, 48:]) | high << np.uint8(4))


def _q6_k(b: Bytes) -> Groups:
    low, high = b[:, :128].reshape(-1, 2, 2, 32), b[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # [n, 2, 4, 32]
    codes = low | (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
    scales = half(b[:, 208:210]) * b[:, 192:208].view(np.int8)
    return Groups((codes.view(np.int8) - np.int8(32)).reshape(-1, 16, 16), scales)


def _mxfp4(b: Bytes) -> Groups:
    exponents = b[:, :1].astype(np.int32)
    scales = np.ldexp(np.float32(1), exponents - 128)  # half of 2^(e - 127), as the codes are doubled
    # OCP MX v1.0 section 5.4.1: 255 is not a number
    return Groups(E2M1[_nibbles(b[:, None, 1:])], np.where(exponents == 255, np.float32(np.nan), scales))


FORMATS = {
    format.name: format
    for format in (
        BlockFormat("Q8_0", 32, 34, _q8_0),
        BlockFormat("Q4_0", 32, 18, _q4_0),
        BlockFormat("Q4_1", 32, 20, _q4_1),
        BlockFormat("Q5_0", 32, 22, _q5_0),
        BlockFormat("Q5_1", 32, 24, _q5_1),
        BlockFormat("Q4_K", 256, 144, _q4_k),
        BlockFormat("Q5_K", 256, 176, _q5_k),
        BlockFormat("Q6_K", 256, 210, _q6_k, unsigned=32),
        BlockFormat("MXFP4", 32, 17, _mxfp4),
    )
}
