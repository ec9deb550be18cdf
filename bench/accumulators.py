# SPDX-License-Identifier: Apache-2.0
"""Sums of products as kernels compute them: legal sums in many orders, and sums of faulty accumulators.

Each function takes the terms of 384 sums, float64 [n, 384], which hold the products exactly. It returns the sums [384].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.arithmetic.formats import FORMATS, nearest, ulp

OUTPUTS = 384
KINDS = ("gaussian", "outliers", "lognormal", "one-signed", "blocks", "cancelling")
F32 = np.float32


def data(kind: str, n: int, storage: str, seed: int = 1) -> tuple[Any, Any]:
    """A row [n] and weights [n, 384], values of the storage dtype in float64 arrays."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal(n), rng.standard_normal((n, OUTPUTS)) / math.sqrt(n)
    if kind == "outliers":
        x = rng.standard_t(2, n)
    elif kind == "lognormal":
        x = rng.lognormal(0, 1.5, n) * rng.choice([-1, 1], n)
    elif kind == "one-signed":
        x, w = np.abs(x), np.abs(w)
    elif kind == "blocks":
        x, w = np.where(np.arange(n) < n // 2, 1.0, -1.0) * (1 + np.abs(x) / 9), np.abs(w)
    elif kind == "cancelling":
        x[n // 3], x[2 * n // 3] = 300.0, -300.0
        w[2 * n // 3] = w[n // 3]
    if storage == "float16":
        x = np.clip(x, -100, 100)
    format = FORMATS[storage]
    return nearest(x, format), nearest(w, format)


# ---- legal sums: from exact terms [n, 384] in float64, each product rounded to float32 first


def sequential(terms: Any) -> Any:
    total = np.zeros(terms.shape[1:], F32)
    for term in terms.astype(F32):
        total = total + term
    return total


def lanes(terms: Any, count: int) -> Any:
    rows = terms.astype(F32)
    rows = np.concatenate([rows, np.zeros((-len(rows) % count, *rows.shape[1:]), F32)])
    parts = np.zeros((count, *rows.shape[1:]), F32)
    for block in rows.reshape(-1, count, *rows.shape[1:]):
        parts = parts + block
    while len(parts) > 1:
        parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
    return parts[0]


def fused(terms: Any) -> Any:
    total = np.zeros(terms.shape[1:], F32)
    for term in terms:
        total = (total + term).astype(F32)  # the product is exact in float64, the sum all but
    return total


def split(terms: Any, parts: int) -> Any:
    return sequential(np.stack([sequential(part) for part in np.array_split(terms, parts)]))


def permuted(terms: Any) -> Any:
    return sequential(terms[np.random.default_rng(2).permutation(len(terms))])


LEGAL: dict[str, Callable[[Any], Any]] = {
    "sequential": sequential, "reversed": lambda t: sequential(t[::-1]), "permuted": permuted, "fused": fused,
    "16 lanes": lambda t: lanes(t, 16), "512 lanes": lambda t: lanes(t, 512), "split in 8": lambda t: split(t, 8),
}  # fmt: skip


def aligned(terms: Any, block: int, bits: int) -> Any:
    """Sums as a tensor core computes them: align a block and the partial sum to the largest exponent, cut, add, cut."""
    total = np.zeros(terms.shape[1:])
    for start in range(0, len(terms), block):
        part = np.concatenate([total[None], terms[start : start + block]])
        step = np.ldexp(1.0, np.frexp(np.abs(part).max(0))[1] - bits)
        total = (np.trunc(part / step) * step).sum(0)
        step = np.ldexp(1.0, np.frexp(np.abs(total))[1] - bits)
        total = np.trunc(total / step) * step
    return total


TRUNCATED: dict[str, Callable[[Any], Any]] = {
    f"24 bits, blocks of {block}": lambda t, block=block: aligned(t, block, 24) for block in (4, 8, 16)
}


def by_size(terms: Any) -> Any:
    """Sums in an order that depends on the values. The radius allows for such orders, the variance does not."""
    return sequential(np.sort(terms, axis=0))


# ---- faults


def narrow(terms: Any, dtype: Any, block: int) -> Any:
    """The partial sum is stored in a narrower dtype after each block."""
    total = np.zeros(terms.shape[1:], dtype)
    for start in range(0, len(terms), block):
        part = terms[start : start + block].astype(F32).sum(0, dtype=F32)
        total = (total.astype(F32) + part).astype(dtype)
    return total.astype(np.float64)


def without(terms: Any, dropped: slice) -> Any:
    kept = np.ones(len(terms), bool)
    kept[dropped] = False
    return lanes(terms[kept], 16)


FAULTS: dict[str, Callable[[Any], Any]] = {
    "one term dropped": lambda t: without(t, slice(len(t) // 2, len(t) // 2 + 1)),
    "last 32 dropped": lambda t: without(t, slice(-32, None)),
    "float16 accumulator, per 32": lambda t: narrow(t, np.float16, 32),
    "float16 accumulator, per term": lambda t: narrow(t, np.float16, 1),
    "bfloat16 accumulator, per 256": lambda t: narrow(t, ml_dtypes.bfloat16, 256),
    "14-bit aligned accumulator": lambda t: aligned(t, 16, 14),
}

NO_FAULT = (("TF32 inputs", "bfloat16"), ("TF32 inputs", "float16"), ("output truncated", "float32"))
"""The faults that change nothing, with the storage dtypes where that is so."""


def tf32(values: Any) -> Any:
    step = np.ldexp(1.0, np.frexp(values)[1] - 11)
    return np.rint(values / step) * step


def toward_zero(values: Any, storage: str) -> Any:
    spacing = ulp(values, FORMATS[storage])
    return np.trunc(np.asarray(values, np.float64) / spacing) * spacing
