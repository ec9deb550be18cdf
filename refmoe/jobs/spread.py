# SPDX-License-Identifier: Apache-2.0
"""Spread the experts of a layer over an executor. They are most of the work, and independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.errors import InputError, require
from refmoe.files.numbers import integer
from refmoe.jobs.source import Source, loaded
from refmoe.parallel import process_pool
from refmoe.spec.experts import Expert, run_expert
from refmoe.steps.grouped import by_expert

WORKER_BYTES = 64 << 20
"""Bytes to keep weights in, per worker. Little, since each expert is read only once."""

MOST_WORKERS = 1024
"""The most processes of one machine."""


@lru_cache(maxsize=2)
def worker_ops(dtype: str) -> Any:
    """The ops of a worker, by the name of the arithmetic. Every process computes the same ``exact`` results."""
    return ExactOps(prepared_bytes=WORKER_BYTES) if dtype == "exact" else NativeOps(dtype, upcast_bytes=WORKER_BYTES)


def expert_task(source: Source, dtype: str, layer: int, expert: int, rows: Any) -> tuple[Any, ...]:
    """Run one expert on its rows, in any process. rows: [n, D]   returns: gate, up, hidden [n, F] and output [n, D]"""
    own: Array = np.array(rows)
    parameters = loaded(source).parameters
    return run_expert(worker_ops(dtype), parameters.layers[layer].experts[expert], own)


def spread_experts(executor: Executor, source: Source, dtype: str) -> Callable[..., Array]:
    """The step `refmoe.steps.grouped.run_experts`, in which the executor runs each expert."""

    def run_experts(ops: ArrayOps, experts: Sequence[Expert], x: Array, chosen: Array) -> Array:
        layer = int(experts[0].w1.name.split(".")[1])  # type: ignore[attr-defined]

        def run(parts: Sequence[tuple[int, Array]]) -> list[tuple[Array, ...]]:
            futures = [executor.submit(expert_task, source, dtype, layer, expert, rows) for expert, rows in parts]
            return [result_of(future) for future in futures]

        return by_expert(ops, len(experts), x, chosen, run)

    return run_experts


def result_of(future: Any) -> Any:
    """The result of a task. Raises InputError when its worker died."""
    with worker_deaths():
        return future.result()


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Turn the exceptions that a dead worker causes, when a task is handed in or fetched, into InputError."""
    try:
        yield
    except (BrokenExecutor, CancelledError) as error:
        raise InputError(_died(error)) from None
    except Exception as error:
        if type(error).__name__ in ("KilledWorker", "CommClosedError", "FutureCancelledError"):  # of distributed
            raise InputError(_died(error)) from None
        raise


def _died(error: BaseException) -> str:
    return (
        f"--executor: a worker process died while it computed ({type(error).__name__}); start the same command again: "
        "finished layers of an emission are kept"
    )


@contextmanager
def open_executor(spec: str) -> Iterator[Executor]:
    """The executor that ``--executor`` names: ``processes``, ``processes:N`` or ``dask:ADDRESS``. Raises InputError."""
    kind, rest = parse_executor(spec)
    if kind == "processes":
        with process_pool(integer(rest)) as pool, worker_deaths():
            yield pool
    else:
        with _dask_client(rest) as client, worker_deaths():
            yield client.get_executor()


def parse_executor(spec: str) -> tuple[str, str]:
    """The kind of an executor and the text after the colon. Raises InputError when `spec` names no executor."""
    kind, _, rest = spec.partition(":")
    if kind == "dask" and rest:
        return kind, rest
    if kind == "processes" and (not rest or 0 < (integer(rest) or 0) <= MOST_WORKERS):
        return kind, rest
    raise InputError(
        f"--executor is '{spec}', but processes, processes:N with N up to {MOST_WORKERS}, or dask:ADDRESS was expected"
    )


@contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    distributed = require("distributed", "cluster", f"--executor dask:{address}")
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(f"--executor dask:{address}: no scheduler answers there: {error}") from None
    with client:
        yield client
