# SPDX-License-Identifier: Apache-2.0
"""`Kernels` over NumPy and the CPU runner, in every order of threads and with poisoned outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.cuda.kernels import source
from refmoe.cuda.kernels.calls import Kernels
from tests.cuda.runner.compile import PLAIN, missing_compiler
from tests.cuda.runner.module import EVERY_ORDER, Conditions, Module

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
UNIT = 2.0**-24
"""Rounding of one float32 operation, relative."""
HALF_STEP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Rounding to a stored dtype, relative; of normal numbers."""
SMALLEST_NORMAL = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}


class PoisonedNumpy:
    """NumPy whose empty arrays hold a recognisable pattern, so that elements that a kernel does not write show."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> Any:
        made: Any = np.empty(shape, dtype)
        made.reshape(-1).view(np.uint8)[:] = 0xCB
        return made

    def empty_like(self, array: Any) -> Any:
        return self.empty(array.shape, array.dtype)


@cache
def module(file: str, flags: tuple[str, ...] = PLAIN) -> Module:
    return Module(source.text(file), source.expressions(file), flags)


def kernels(conditions: Conditions, flags: tuple[str, ...] = PLAIN) -> Kernels:
    """All kernels, run under these conditions."""
    return Kernels(PoisonedNumpy(), lambda file: module(file, flags).under(conditions))


def in_every_order(
    call: Callable[[Kernels], Any],
    orders: Sequence[Conditions] = EVERY_ORDER,
    over: Callable[[Conditions], Kernels] = kernels,
) -> Any:
    """The result of `call`, after a check that every order of threads gives equal bits."""
    first, *others = (call(over(conditions)) for conditions in orders)
    for other in others:
        for a, b in zip(arrays_of(first), arrays_of(other), strict=True):
            assert a.tobytes() == b.tobytes(), "the order of threads changes the result"
    return first


def arrays_of(result: Any) -> Iterator[np.ndarray[Any, Any]]:
    yield from result if isinstance(result, tuple) else (result,)


def chain(n: int, threads: int = 32) -> int:
    """The most roundings of one element in a sum by `threads` threads: its thread's pieces of 8, then the tree."""
    pieces = -(-n // 8)
    return 8 * -(-pieces // threads) + 5 + (threads // 32 if threads > 32 else 0)


def growth(roundings: int) -> float:
    """Higham's gamma: the largest relative error of this number of float32 roundings."""
    return roundings * UNIT / (1 - roundings * UNIT)


def stored(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    """Normal variates in a stored dtype."""
    return rng.standard_normal(shape).astype(DTYPES[dtype])
