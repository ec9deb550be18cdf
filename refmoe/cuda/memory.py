"""What a model takes on a device: weights, cache, buffers; and what of that is missing."""

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
"""How many arrays of the size of a step's result are there at once: it, what it is made of, and temporaries."""
SLICES = 5
"""Into so many slices exact products cut their factors, at most."""
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
    """Bytes of a weight on the device: float64 is kept at the computing dtype, and the rest as it is stored.

    Exact arithmetic keeps the leading slices of all of them, in float64.
    """
    return ITEMSIZE[dtype] if dtype == "exact" else min(ITEMSIZE[stored], max(4, ITEMSIZE[dtype]))


def widest(dtypes: Sequence[str]) -> str:
    """The widest of the dtypes that safetensors gives these names, as NumPy names it."""
    return str(max((np.dtype(DTYPES[name]) for name in dtypes), key=lambda dtype: dtype.itemsize))


def buffer_bytes(config: Config, tokens: int, pairs: int, dtype: str) -> int:
    """Bytes of what a call computes on its way, about.   pairs: of queries and keys that attend at a time"""
    k, size = config.experts_per_token, ITEMSIZE[dtype]
    experts = tokens * k * (3 * config.hidden_dim + 2 * config.dim)
    live = LIVE * max(config.heads * pairs, experts, tokens * config.vocab) * size
    matrix = max(config.hidden_dim, config.vocab, config.heads * config.head_dim) * config.dim * size
    if dtype == "exact":
        return 2 * live + SLICES * CHUNK * size + matrix + LIBRARIES
    return live + 2 * matrix + LIBRARIES  # a matrix at the computing dtype, while it is made


def resident(config: Config, tokens: int, past: int, stored: str, dtype: str) -> Need:
    """Of a model that stays on the device while it reads `tokens` at once, with a cache for these and `past`."""
    weights = total_parameters(config) * kept_itemsize(stored, dtype)
    size = ITEMSIZE[dtype]
    cache = cache_bytes(config) // ITEMSIZE["float32"] * size * (tokens + past)
    return Need(weights, cache, buffer_bytes(config, tokens, tokens * (past + tokens), dtype))


def by_layers(config: Config, calls: Sequence[tuple[int, int]], stored: str, dtype: str) -> Need:
    """Of a model of which one layer at a time is on the device.

    calls: of every call how many tokens it has and how many are before them. All go through a layer together.
    """
    tokens = sum(new for new, _ in calls)
    experts = config.experts if dtype != "exact" else 1  # in exact arithmetic one matrix after the other will do
    layer = max(3 * experts * config.hidden_dim, config.vocab) * config.dim
    pairs = max(new * (past + new) for new, past in calls)
    cache = cache_bytes(config) // ITEMSIZE["float32"] // config.layers * ITEMSIZE[dtype] * tokens
    return Need(layer * kept_itemsize(stored, dtype), cache, buffer_bytes(config, tokens, pairs, dtype))


def gibibytes(size: int) -> str:
    """In words, so that what is there and too little is never shown as enough."""
    return f"{size / 2**30:,.2f} GiB"


def missing(need: Need, free: int) -> str | None:
    """One sentence that says how much device memory is missing; None where there is enough."""
    if need.total <= free:
        return None
    return (
        f"{gibibytes(need.total)} of device memory are needed (weights {gibibytes(need.weights)}, cache "
        f"{gibibytes(need.cache)}, buffers {gibibytes(need.buffers)}), but {gibibytes(free)} are free: "
        f"{gibibytes(need.total - free)} are missing"
    )
