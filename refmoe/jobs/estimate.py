# SPDX-License-Identifier: Apache-2.0
"""The cost of a run, estimated before it begins: memory, bytes of weights to read, bytes of the trace to write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from refmoe.arithmetic.streaming import AHEAD, block_rows
from refmoe.arithmetic.weight_cache import STREAMED
from refmoe.checkpoints.names import parameter_shape
from refmoe.files.reading import system_text
from refmoe.spec.config import Config
from refmoe.spec.taps import LAYER_TAPS
from refmoe.traces.trace import Run

BASE = 160 << 20
"""Bytes of a Python process with NumPy and its BLAS buffers, measured."""
SLICES = 5
"""Products of an exact linear map that are in memory at once: one for each of at most four slices, one for the rest."""
ATTENTION = ("wq", "wk", "wv", "wo")
COPIES = 4
"""Copies of a layer's activations in memory: the record, the part being written, the temporaries of the next step."""


@dataclass(frozen=True)
class Estimate:
    """Upper bounds, in bytes."""

    memory: int
    weights: int
    """Stored parameters to read, if the tokens choose as many different experts as they can."""
    trace: int


def itemsize(arithmetic: str) -> int:
    """The bytes of a number in this arithmetic."""
    return 4 if arithmetic == "float32" else 8


def kept_bytes(config: Config, arithmetic: str) -> int:
    """Bytes to keep converted weights in: enough for a layer's attention, too little for an expert of a large model."""
    largest = max(math.prod(parameter_shape(config, f"layers.0.attention.{w}")) for w in ATTENTION)
    return STREAMED * max(largest, 1 << 22) * itemsize(arithmetic)


def estimate(
    config: Config, runs: Sequence[Run], layers: range, arithmetic: str, taps: str = "*", stored: int = 2
) -> Estimate:
    """The cost of a run layer by layer in one process.   stored: bytes of a stored parameter."""
    size = itemsize(arithmetic)
    tokens = sum(len(run.tokens) for run in runs)
    read = [run for run in runs if run.read]
    layer = {tap: sum(_elements(tap, config, run) for run in read) * size for tap in LAYER_TAPS}
    rows = sum(len(run.tokens) for run in read)
    head = {"final_norm": rows * config.dim * size, "logits": rows * config.vocab * size}
    whole = layers.stop == config.layers
    largest_part = max(sum(layer.values()), sum(head.values()) if whole else 0)
    written = sum(n for i in layers for tap, n in layer.items() if _wanted(f"layers.{i}.{tap}", taps)) + sum(
        n for tap, n in head.items() if whole and _wanted(tap, taps)
    )
    if not layers.start and _wanted("embedding", taps):
        written += rows * config.dim * size
    tallest = max(config.hidden_dim, config.dim, config.heads * config.head_dim, config.vocab)
    height = min(block_rows((config.hidden_dim, config.dim)), tallest)
    block = height * config.dim
    slices = 1 if arithmetic in ("float32", "float64") else SLICES
    # per block: the stored values, the converted values, as much again while converting; then a product per slice
    streaming = (AHEAD + 1) * block * (4 + 2 * size) + 3 * slices * tokens * 2 * height * size
    attention = sum(math.prod(parameter_shape(config, f"layers.0.attention.{w}")) for w in ATTENTION)
    kept = min(kept_bytes(config, arithmetic), 2 * attention * size)  # this layer's weights and the next layer's
    filling = [run for run in runs if not run.read]
    cached = sum(len(run.tokens) for run in filling) * (config.dim + 2 * config.kv_heads * config.head_dim)
    passing = max((sum(_elements(tap, config, run) for tap in LAYER_TAPS) for run in filling), default=0)
    memory = BASE + kept + streaming + COPIES * largest_part + (cached + passing) * size
    return Estimate(memory, _weights(config, layers, whole, tokens) * stored, written)


def _elements(tap: str, config: Config, run: Run) -> int:
    sizes = {
        "T": len(run.tokens), "S": run.past + len(run.tokens), "D": config.dim, "H": config.heads,
        "K": config.kv_heads, "d": config.head_dim, "E": config.experts, "k": config.experts_per_token,
        "F": config.hidden_dim,
    }  # fmt: skip
    return math.prod(sizes[axis] for axis in LAYER_TAPS[tap].split())


def _wanted(name: str, taps: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in taps.split(","))


def _weights(config: Config, layers: range, whole: bool, tokens: int) -> int:
    """The number of parameters to read: rows of the embedding, each matrix of the layers once, and the head."""
    attention = sum(math.prod(parameter_shape(config, f"layers.0.attention.{w}")) for w in ATTENTION)
    experts = min(config.experts, tokens * config.experts_per_token) * 3 * config.dim * config.hidden_dim
    layer = attention + experts + (config.experts + 2) * config.dim
    head = (config.vocab + 1) * config.dim if whole else 0
    embedding = tokens * config.dim if not layers.start else 0
    return len(layers) * layer + head + embedding


def available_memory() -> int | None:
    """The bytes of free memory of this machine; None where /proc/meminfo does not exist or does not say."""
    lines = system_text("/proc/meminfo").splitlines()
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None
