# SPDX-License-Identifier: Apache-2.0
"""Products with a weight that is too large to be held: block after block, the next block read during a product."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from refmoe.arithmetic.arrays import Array, StoredWeight
from refmoe.arithmetic.native.lanes import lanes

Result = TypeVar("Result")

BLOCK = 1 << 21
"""Elements of a weight read at a time: large enough that a product with few rows is worth its overhead."""
AHEAD = 2
"""Blocks in memory besides the block that is multiplied: one being read, one waiting."""


def block_rows(shape: tuple[int, ...]) -> int:
    """The number of rows of a block, for a matrix of this shape."""
    return max(1, BLOCK // max(1, shape[1]))


def block_bounds(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The first row of each block of a matrix of this shape, and the row after its last."""
    step, height = block_rows(shape), shape[0]
    return [(start, min(start + step, height)) for start in range(0, height, step)]


def blocks(weight: StoredWeight, read: Callable[[Array], Any]) -> Iterator[tuple[int, int, Any]]:
    """Every block in order, read ahead in another thread: start, stop, and `read` of the stored rows [start, stop)."""
    bounds = block_bounds(weight.shape)
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


def side_by_side(weight: StoredWeight, read: Callable[[Array], Any], use: Callable[[Any], Result]) -> list[Result]:
    """`use(read(rows))` of the stored rows of every block, in order.

    Threads with a BLAS of one thread each take block after block. So none waits for another, as the threads of a BLAS
    do at each product while a block is read. They hold as many blocks as `blocks` does. With one thread, or in one of
    several lanes, the next block is read during a product.
    """
    here, bounds = lanes(), block_bounds(weight.shape)
    if here.count == 1 or here.busy > 1:
        return [use(ready) for _, _, ready in blocks(weight, read)]
    left, found = deque(enumerate(bounds)), {}

    def work() -> None:
        while left:
            try:
                i, (start, stop) = left.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                found[i] = use(_read(weight, read, start, stop))
            except BaseException:
                left.clear()
                raise

    here.run([work] * min(here.count, 1 + AHEAD, len(bounds)))
    return [found[i] for i in range(len(bounds))]


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
