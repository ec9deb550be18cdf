# SPDX-License-Identifier: Apache-2.0
"""The formula of synthetic weights, which replaces a download.

Every element is an odd integer in [-255, 255] times a power of two fixed per parameter, so that it is exact in
bfloat16, float16, float32 and float64. The integer comes from a hash of (seed, parameter name, flat index). So any
element can be computed without the others, in any language. `golden/FORMAT.md` states the formula with test vectors.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

GOLDEN_RATIO = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
LARGEST = 255
"""The largest magnitude of the odd integers."""
MEAN_SQUARE = 21845
"""The mean square of the odd integers in [-255, 255]: (256^2 - 1) / 3."""

GAINS = {"embedding": 0, "wq": 1, "wk": 1, "wv": 0, "wo": 0, "gate": 1, "w1": 1, "w2": 1, "w3": 1, "output": 1}
"""Logarithm to base two of the gain that each kind of parameter is meant to have.

Gains a little above one in queries, keys and router make attention peaked and choices clear. A gain of two in the
experts keeps their output as large as the residual, so that an error of an expert is visible.
"""

BLOCK = 1 << 15
"""Elements hashed at a time: few enough that the temporaries stay in the second-level cache."""

TOP_BYTE = 7 if sys.byteorder == "little" else 0
"""Which byte of a 64-bit integer in memory is its highest."""

EXPONENTS = range(-126, 121)
"""Exponents at which every element is a normal number of float32 and bfloat16."""


def mix(z: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), on one 64-bit integer."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def stream_key(seed: int, name: str) -> int:
    """The 64-bit key of a parameter's elements: the seed mixed with the first 8 bytes of SHA-256 of the name."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return mix((seed + digest) & MASK)


@cache
def steps() -> np.ndarray[Any, Any]:
    """The first `BLOCK` multiples of `GOLDEN_RATIO`, modulo 2^64: uint64, read-only."""
    multiples = np.arange(BLOCK, dtype=np.uint64) * np.uint64(GOLDEN_RATIO)
    multiples.flags.writeable = False
    return multiples


def hashed_bytes(key: int, start: int, stop: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """The top byte of the hash of each index in [start, stop), in blocks with the index that each begins at."""
    longest = min(BLOCK, stop - start)
    scratch, shifted = np.empty((2, longest), np.uint64)
    for first in range(start, stop, BLOCK):
        n = min(BLOCK, stop - first)
        z, t = scratch[:n], shifted[:n]
        np.add(steps()[:n], np.uint64((key + (first + 1) * GOLDEN_RATIO) & MASK), out=z)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            np.right_shift(z, np.uint64(shift), out=t)
            np.bitwise_xor(z, t, out=z)
            np.multiply(z, np.uint64(factor), out=z)
        # the last xor of the finaliser changes no bit of the top byte
        yield first, z.view(np.uint8)[TOP_BYTE::8]


def elements(
    seed: int, name: str, exponent: int, start: int, stop: int, dtype: Any = np.float32
) -> np.ndarray[Any, Any]:
    """Elements [start, stop) of a matrix in row-major order: [stop - start].

    (2 b - 255) 2^exponent, b the top byte of the hash of the index.
    dtype: float32, or float64 of the same values
    """
    result = np.empty(stop - start, dtype)
    # computed as (b - 127.5) 2^(exponent + 1), in which every step is exact
    scale = result.dtype.type(math.ldexp(1, exponent + 1))
    for first, top in hashed_bytes(stream_key(seed, name), start, stop):
        block = result[first - start : first - start + len(top)]
        block[:] = top
        block -= result.dtype.type(127.5)
        block *= scale
    return result


def gains(seed: int, name: str, size: int) -> np.ndarray[Any, Any]:
    """The gain of a norm: 1 + k/128 with -64 < k < 64, float32 [size]; k = max(b // 2, 1) - 64."""
    result = np.empty(size, np.float32)
    for first, top in hashed_bytes(stream_key(seed, name), 0, size):
        k = np.maximum(top >> 1, 1).astype(np.float32) - 64
        result[first : first + len(top)] = 1 + k / 128
    return result


def default_exponent(name: str, shape: tuple[int, ...]) -> int:
    """The largest e with 4^e * 21845 * fan_in <= 4^gain: unit-size inputs give outputs of about the gain.

    fan_in: the second dimension, or 1 for the embedding.
    """
    kind = name.rpartition(".")[2]
    fan_in = 1 if kind == "embedding" else shape[1]
    # the smallest k with 4^k >= n is half the bit length of n - 1, rounded up; e = gain - k
    return GAINS[kind] - ((MEAN_SQUARE * fan_in - 1).bit_length() + 1) // 2
