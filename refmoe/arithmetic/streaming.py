# SPDX-License-Identifier: Apache-2.0
"""Products with a weight that is too large to be held: block after block, the next block read during a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, StoredWeight

BLOCK = 1 << 21
"""Elements of a weight read at a time: large enough that a product with few rows is worth its overhead."""
AHEAD = 2
"""Blocks in memory besides the block that is multiplied: one being read, one waiting."""


def block_rows(shape: tuple[int, ...]) -> int:
    """The number of rows of a block, for a matrix of this shape."""
    return max(1, BLOCK // max(1, shape[1]))


def blocks(weight: StoredWeight, read: Callable[[Array], Any]) -> Iterator[tuple[int, int, Any]]:
    """Every block in order, read ahead in another thread: start, stop, and `read` of the stored rows [start, stop)."""
    step, height = block_rows(weight.shape), weight.shape[0]
    bounds = [(start, min(start + step, height)) for start in range(0, height, step)]
    reader = ThreadPoolExecutor(1, "read-ahead")
    try:
        waiting = [reader.submit(_read, weight, read, *each) for each in bounds[:AHEAD]]
        for i, (start, stop) in enumerate(bounds):
            ready = waiting.pop(0).result()
            if i + AHEAD < len(bounds):
                waiting.append(reader.submit(_read, weight, read, *bounds[i + AHEAD]))
            yield start, stop, ready
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


def _read(weight: StoredWeight, read: Callable[[Array], Any], start: int, stop: int) -> Any:
    return read(weight.block(start, stop))


def linear_by_blocks(
    x: Array, weight: StoredWeight, read: Callable[[Array], Any], product: Callable[[Array, Any], Array]
) -> Array:
    """x times the transpose of the weight. x: [..., n]   weight: [m, n]   returns: [..., m]

    read: converts stored rows, in the reading thread.   product: multiplies x by a block that `read` has converted.
    """
    result = np.empty((*x.shape[:-1], weight.shape[0]), x.dtype)
    for start, stop, ready in blocks(weight, read):
        result[..., start:stop] = product(x, ready)
    return result
