# SPDX-License-Identifier: Apache-2.0
"""Spread the experts of a layer over an executor. They are most of the work, and independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.jobs.source import Source, loaded
from refmoe.parallel import worker_deaths
from refmoe.spec.experts import Expert, run_expert
from refmoe.steps.grouped import by_expert

WORKER_BYTES = 64 << 20
"""Bytes to keep weights in, per worker. Little, since each expert is read only once."""


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
    """The result of a task. Raises WorkerLost when its worker died."""
    with worker_deaths():
        return future.result()
