# SPDX-License-Identifier: Apache-2.0
"""Lanes: a few threads, each with a BLAS of one thread, that run independent pieces of a step in parallel.

When a BLAS spreads one product over its threads, they wait for each other at each product. All other work is left to
one thread. Independent pieces, such as experts, need not wait.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")


class Lanes:
    """As many lanes as the BLAS of NumPy has threads."""

    def __init__(self) -> None:
        self._blas = ThreadpoolController().select(user_api="blas")
        self.count = max((library["num_threads"] for library in self._blas.info()), default=1)
        self.busy = 1
        """How many lanes work now."""
        self._pool = ThreadPoolExecutor(max(self.count - 1, 1), "lane")

    def run(self, pieces: Sequence[Callable[[], None]]) -> None:
        """Call each piece once, started in this order. An exception of a piece is raised here when all have ended."""
        if self.count == 1 or not pieces or self.busy > 1:
            for piece in pieces:
                piece()
            return
        left = deque(pieces)

        def work() -> None:
            while left:
                try:
                    piece = left.popleft()
                except IndexError:  # another lane took the last one
                    return
                piece()

        with self._blas.limit(limits=1):
            self.busy = min(self.count, len(pieces))
            # also a single piece gets a BLAS of one thread: the other threads of a BLAS would spin and slow it down
            others = [self._pool.submit(work) for _ in range(self.busy - 1)]
            try:
                work()
            finally:
                left.clear()
                wait(others)
                self.busy = 1
        for other in others:
            other.result()

    def each(self, items: Iterable[Item], use: Callable[[Item], None], most: int | None = None) -> None:
        """Call `use` once for each item, started in this order. After an exception no other call starts.

        most: the most lanes
        """
        left = deque(items)

        def work() -> None:
            while left:
                try:
                    item = left.popleft()
                except IndexError:  # another lane took the last one
                    return
                try:
                    use(item)
                except BaseException:
                    left.clear()
                    raise

        self.run([work] * min(self.count, len(left), most or self.count))


@cache
def lanes() -> Lanes:
    """The lanes of this process."""
    return Lanes()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lanes.cache_clear)  # threads are not inherited: the child makes its own
