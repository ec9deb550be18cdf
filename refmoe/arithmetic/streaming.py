# SPDX-License-Identifier: Apache-2.0
"""Products with a weight that is too large to be held, block after block.

The next block of a file is read during a product. Blocks that are computed, not read, are spread over lanes: each lane
computes a small block and multiplies it while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, StoredWeight
from refmoe.arithmetic.native.lanes import lanes

BLOCK = 1 << 21
"""Elements of a weight read at a time: large enough that a product with few rows is worth its overhead."""
COMPUTED_BLOCK = 1 << 17
"""Elements of a weight computed at a time: few enough that the second-level cache holds them as float64."""
AHEAD = 2
"""Blocks in memory besides the block that is multiplied: one being read, one waiting."""


def block_rows(shape: tuple[int, ...], elements: int | None = None) -> int:
    """The number of rows of a block, for a matrix of this shape.   elements: of a block; None: `BLOCK`"""
    return max(1, (elements or BLOCK) // max(1, shape[1]))


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

    read: converts stored rows.   product: multiplies x by a block that `read` has converted. Several threads call them.
    """
    height = weight.shape[0]
    result = np.empty((*x.shape[:-1], height), x.dtype)
    if weight.computed:

        def piece(start: int, stop: int) -> None:
            result[..., start:stop] = product(x, read(weight.block(start, stop, x.dtype)))

        step = block_rows(weight.shape, COMPUTED_BLOCK)
        lanes().run([partial(piece, start, min(start + step, height)) for start in range(0, height, step)])
        return result
    for start, stop, ready in blocks(weight, read):
        result[..., start:stop] = product(x, ready)
    return result
