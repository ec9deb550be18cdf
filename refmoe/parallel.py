"""Work on several items at once, in processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

Item = TypeVar("Item")
Result = TypeVar("Result")

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""What tells the BLAS libraries in use to start one thread: read once, when a process loads them."""


@contextmanager
def results(
    function: Callable[[Item], Result], items: Sequence[Item], jobs: int | None = None
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Yield an iterator over (item, its result), each as it is done; what a call raises is raised there.

    function: importable by name, as are the items.   jobs: processes with one BLAS thread each, or None for one per
    core. With one job or one item all happens in this process.
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
    """Processes with one BLAS thread each, as many as given or as there are cores; what waits at the end is dropped."""
    # spawned, not forked: a forked process would keep the threads of a BLAS that is already loaded
    with mock.patch.dict(os.environ, ONE_THREAD):
        executor = ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn"))
        try:
            yield executor
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
