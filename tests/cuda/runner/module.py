# SPDX-License-Identifier: Apache-2.0
"""Launch compiled kernels on NumPy arrays, with the call signature of CuPy's RawModule and RawKernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.cuda.runner.compile import PLAIN, shared_library
from tests.cuda.runner.guarded import Guarded

ORDERS = ("abreast", "descending", "random")
SECONDS = 60


class LaunchError(Exception):
    """The error of a kernel, with its block and thread."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a launch: the order of threads and blocks, the guarded side of arrays, flushed subnormals.

    guard: a side as in `Guarded`; None: the arrays themselves, unguarded.
    """

    order: str = "abreast"
    guard: str | None = "end"
    seed: int = 0
    flush: bool = False


EVERY_ORDER = (
    Conditions("abreast", "end"),
    Conditions("descending", "vectors"),
    Conditions("random", "start", seed=1),
    Conditions("random", "end", seed=2, flush=True),
)
"""Each order and each guard, with subnormals flushed as on the device."""


class _Argument(ctypes.Structure):
    _fields_ = (("value", ctypes.c_void_p), ("pointer", ctypes.c_int), ("kind", ctypes.c_int), ("size", ctypes.c_int))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("order", ctypes.c_int), ("flush", ctypes.c_int),
        ("seed", ctypes.c_uint64), ("arguments", ctypes.POINTER(_Argument)), ("count", ctypes.c_int),
        ("seconds", ctypes.c_int), ("message", ctypes.c_char * 512), ("fault", ctypes.c_void_p),
    )  # fmt: skip


class Module:
    """Compiled text. Under given conditions it has the `get_function` of CuPy's RawModule."""

    def __init__(self, text: str, expressions: Sequence[str], flags: Sequence[str] = PLAIN) -> None:
        self._library = shared_library(text, expressions, flags)
        self._expressions = tuple(expressions)

    def under(self, conditions: Conditions) -> Callable[[str], Callable[..., None]]:
        """`get_function`, from a name expression to a function of (grid, block, arguments)."""

        def get_function(expression: str) -> Callable[..., None]:
            symbol = self._library[f"launch_{self._expressions.index(expression)}"]
            return lambda grid, block, arguments: _launch(symbol, expression, grid, block, arguments, conditions)

        return get_function


def _launch(
    symbol: Any, expression: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], how: Conditions
) -> None:
    guards: dict[int, Guarded] = {}
    held, described = [], (_Argument * len(arguments))()
    for i, argument in enumerate(arguments):
        number = as_cupy_passes(argument)
        if isinstance(argument, np.ndarray):
            if how.guard:
                guards[i] = Guarded(argument, how.guard)
            held.append(np.uint64(guards[i].address if how.guard else argument.ctypes.data).reshape(1))
        else:
            held.append(number.reshape(1))
        described[i] = _Argument(
            held[-1].ctypes.data, isinstance(argument, np.ndarray), ord(number.dtype.kind), number.itemsize
        )
    launch = _Launch(
        grid=(*grid, 1, 1)[:3],
        block=(*block, 1, 1)[:3],
        order=ORDERS.index(how.order),
        flush=how.flush,
        seed=how.seed,
        arguments=described,
        count=len(arguments),
        seconds=SECONDS,
    )
    symbol(ctypes.byref(launch))
    outside = [i for i, guard in guards.items() if guard.finish()]
    message = launch.message.decode()
    if message:
        at = [(i, guard.offset(launch.fault), guard) for i, guard in guards.items() if launch.fault is not None]
        where = [f": argument {i}, byte {offset} of {g.array.nbytes}" for i, offset, g in at if offset is not None]
        raise LaunchError(f"{expression}: {message}{''.join(where)}")
    if outside:
        raise LaunchError(f"{expression}: wrote outside argument {outside[0]}")


def as_cupy_passes(argument: Any) -> Any:
    """An argument as CuPy passes it: a Python int as int64, a float as float64, for any parameter."""
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise LaunchError("an array that is not contiguous: CuPy would pass its address and ignore its strides")
        return argument
    return np.asarray(argument)
