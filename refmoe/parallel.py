# SPDX-License-Identifier: Apache-2.0
"""Work on several items at once, in processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Variables that make a BLAS library start one thread. A process reads them once, when it loads the library."""


@contextmanager
def results(
    function: Callable[[Item], Result], items: Sequence[Item], jobs: int | None = None
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Yield an iterator over pairs (item, its result), in the order in which they finish.

    function, items: must be importable or picklable, as other processes receive them.
    jobs: the number of processes, with one BLAS thread each; None: one per core. With one job or one item, all work
    happens in this process.
    The iterator raises the exception of a call when it reaches that item.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(items))
    if jobs <= 1:
        yield ((item, function(item)) for item in items)
        return
    with process_pool(jobs) as executor:
        futures = {executor.submit(function, item): item for item in items}
        yield ((futures[future], future.result()) for future in as_completed(futures))


@contextmanager
def process_pool(jobs: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes with one BLAS thread each. At the end, waiting tasks are cancelled.

    jobs: the number of processes; None: one per core.
    """
    # spawned, not forked: a forked process would keep the threads of a BLAS that is already loaded
    with environment(ONE_THREAD):
        executor = ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn"))
        try:
            yield executor
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore their old values at the end."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
