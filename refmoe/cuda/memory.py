# SPDX-License-Identifier: Apache-2.0
"""The device memory that a model needs (weights, cache, buffers), and how much of it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refmoe.arithmetic.exact.dot import CHUNK
from refmoe.checkpoints.size import total_parameters
from refmoe.files.safetensors_file import DTYPES
from refmoe.spec.config import Config

ITEMSIZE = {"exact": 8, "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LIVE = 4
"""Arrays of the size of a step's result in memory at once: the result, its inputs, and temporaries."""
SLICES = 5
"""The most slices into which exact products split their factors."""
LIBRARIES = 512 << 20
"""Bytes that the CUDA context, cuBLAS and compiled kernels take. Not yet measured."""


@dataclass(frozen=True)
class Need:
    """Bytes on the device."""

    weights: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers


def cache_bytes(config: Config, dtype: str = "float32") -> int:
    """Bytes of keys and values that one token adds to the caches of all layers."""
    return config.layers * 2 * config.kv_heads * config.head_dim * ITEMSIZE[dtype]


def kept_itemsize(stored: str, dtype: str) -> int:
    """Bytes per element of a weight on the device: float64 is kept at the computing dtype, other dtypes as stored.

    Exact arithmetic keeps the leading slice of every weight, in float64.
    """
    return ITEMSIZE[dtype] if dtype == "exact" else min(ITEMSIZE[stored], max(4, ITEMSIZE[dtype]))


def widest(dtypes: Sequence[str]) -> str:
    """The widest of some dtypes, by NumPy's name. dtypes: names in the safetensors format"""
    return str(max((np.dtype(DTYPES[name]) for name in dtypes), key=lambda dtype: dtype.itemsize))


def buffer_bytes(config: Config, tokens: int, pairs: int, dtype: str) -> int:
    """About how many bytes the intermediate arrays of a call need.   pairs: (query, key) pairs that attend at a time"""
    k, size = config.experts_per_token, ITEMSIZE[dtype]
    experts = tokens * k * (3 * config.hidden_dim + 2 * config.dim)
    live = LIVE * max(config.heads * pairs, experts, tokens * config.vocab) * size
    matrix = max(config.hidden_dim, config.vocab, config.heads * config.head_dim) * config.dim * size
    if dtype == "exact":
        return 2 * live + SLICES * CHUNK * size + matrix + LIBRARIES
    return live + 2 * matrix + LIBRARIES  # two matrices: one as stored, one converted to the computing dtype


def resident(config: Config, tokens: int, past: int, stored: str, dtype: str) -> Need:
    """The need of a model that stays on the device and reads `tokens` at once, with a cache for these and `past`."""
    weights = total_parameters(config) * kept_itemsize(stored, dtype)
    size = ITEMSIZE[dtype]
    cache = cache_bytes(config) // ITEMSIZE["float32"] * size * (tokens + past)
    return Need(weights, cache, buffer_bytes(config, tokens, tokens * (past + tokens), dtype))


def by_layers(config: Config, calls: Sequence[tuple[int, int]], stored: str, dtype: str) -> Need:
    """The need of a model of which one layer at a time is on the device.

    calls: for each call its number of tokens and the number of tokens before them. All calls pass a layer together.
    """
    tokens = sum(new for new, _ in calls)
    experts = config.experts if dtype != "exact" else 1  # exact arithmetic can take one matrix after another
    layer = max(3 * experts * config.hidden_dim, config.vocab) * config.dim
    pairs = max(new * (past + new) for new, past in calls)
    cache = cache_bytes(config) // ITEMSIZE["float32"] // config.layers * ITEMSIZE[dtype] * tokens
    return Need(layer * kept_itemsize(stored, dtype), cache, buffer_bytes(config, tokens, pairs, dtype))


def gibibytes(size: int) -> str:
    """A number of bytes in GiB, with two decimals."""
    return f"{size / 2**30:,.2f} GiB"


def missing(need: Need, free: int) -> str | None:
    """One sentence about the device memory that is missing; None where there is enough."""
    if need.total <= free:
        return None
    return (
        f"{gibibytes(need.total)} of device memory are needed (weights {gibibytes(need.weights)}, cache "
        f"{gibibytes(need.cache)}, buffers {gibibytes(need.buffers)}), but {gibibytes(free)} are free: "
        f"{gibibytes(need.total - free)} are missing"
    )
