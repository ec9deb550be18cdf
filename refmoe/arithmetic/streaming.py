# SPDX-License-Identifier: Apache-2.0
"""Products with a weight that is too large to be held, block after block.

The next block of a file is read during a product. Blocks that are computed, not read, are spread over lanes: each lane
computes a small block and multiplies it while it is in the cache. Small blocks of a file can be spread as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from refmoe.arithmetic.arrays import Array, StoredWeight
from refmoe.arithmetic.native.lanes import lanes

Result = TypeVar("Result")

BLOCK = 1 << 21
"""Elements of a weight read at a time: large enough that a product with few rows is worth its overhead."""
COMPUTED_BLOCK = 1 << 17
"""Elements of a weight computed at a time: few enough that the second-level cache holds them as float64."""
SMALL_BLOCK = 1 << 20
"""Elements of a file read at a time where they are not kept: few enough that the third-level cache holds them."""
AHEAD = 2
"""Blocks in memory besides the block that is multiplied: one being read, one waiting."""


def block_rows(shape: tuple[int, ...], elements: int | None = None) -> int:
    """The number of rows of a block, for a matrix of this shape.   elements: of a block; None: `BLOCK`"""
    return max(1, (elements or BLOCK) // max(1, shape[1]))


def block_bounds(shape: tuple[int, ...], elements: int | None = None) -> list[tuple[int, int]]:
    """The first row of each block of a matrix of this shape, and the row after its last.   elements: as `block_rows`"""
    step, height = block_rows(shape, elements), shape[0]
    return [(start, min(start + step, height)) for start in range(0, height, step)]


def blocks(weight: StoredWeight, read: Callable[[Array], Any]) -> Iterator[tuple[int, int, Any]]:
    """Every block in order, read ahead in another thread: start, stop, and `read` of the stored rows [start, stop)."""
    return _in_order(partial(_read, weight, read), block_bounds(weight.shape))


def _in_order(
    read: Callable[[int, int], Result], bounds: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, Result]]:
    """Start, stop, and `read` of these, which another thread calls ahead.   bounds: all starts and stops"""
    reader = ThreadPoolExecutor(1, "read-ahead")
    try:
        waiting = [reader.submit(read, *each) for each in bounds[:AHEAD]]
        for i, (start, stop) in enumerate(bounds):
            ready = waiting.pop(0).result()
            if i + AHEAD < len(bounds):
                waiting.append(reader.submit(read, *bounds[i + AHEAD]))
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
    found = {}

    def work(start: int, stop: int) -> None:
        found[start] = use(_read(weight, read, start, stop))

    here.each(bounds, lambda each: work(*each), most=1 + AHEAD)
    return [found[start] for start, _ in bounds]


@dataclass(frozen=True)
class UnreadRows:
    """The rows of a matrix in a file. They are read a few at a time, and not kept."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[int, int], Array]
    """Returns rows [start, stop)."""

    def each(self, use: Callable[[int, Array], None]) -> None:
        """`use` of the number of a row, and of this and the rows after it, until all have been used.

        Several threads may call it. With one thread, or in one of several lanes, the next rows are read meanwhile.
        """
        here, bounds = lanes(), block_bounds(self.shape, SMALL_BLOCK)
        if here.count > 1 and here.busy == 1:
            here.each(bounds, lambda each: use(each[0], self.read(*each)))
            return
        for start, _, rows in _in_order(self.read, bounds):
            use(start, rows)


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
