# SPDX-License-Identifier: Apache-2.0
"""A strict stand-in for CuPy over NumPy: it refuses all that CuPy refuses, so that host code can be tested without one.

An array is never converted to NumPy's implicitly, and cannot be mixed with NumPy's. Reductions return arrays of no
dimension and take no `initial` or `where`. New memory holds a pattern. Kernels run through the CPU runner.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from tests.cuda.on_cpu import PoisonedNumpy
from tests.cuda.runner.module import Conditions, Module

FREE, TOTAL = 1 << 30, 2 << 30
"""Bytes of the device that the stand-in claims to have."""
CREATES = ("asarray", "array", "ascontiguousarray")
"""The functions that take NumPy's arrays and copy them to the device."""
METHODS = (
    "all", "any", "argmax", "astype", "copy", "fill", "max", "min", "nonzero", "ravel", "reshape", "squeeze", "sum",
    "take", "transpose", "view",
)  # fmt: skip
ATTRIBUTES = ("dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size")
TO_HOST = ("item", "tolist")


def host(x: Any) -> Any:
    """The values of device arrays, also nested ones. Raises TypeError for a host array."""
    if isinstance(x, DeviceArray):
        return x.values
    if isinstance(x, np.ndarray):
        raise TypeError(f"a NumPy array {x.shape} among the device's")
    return type(x)(map(host, x)) if isinstance(x, list | tuple) else x


def device(x: Any) -> Any:
    """A result of NumPy, as CuPy would return it."""
    if isinstance(x, np.ndarray | np.generic):
        return DeviceArray(np.asarray(x))
    return tuple(map(device, x)) if isinstance(x, list | tuple) else x


def refuse(keywords: Any) -> None:
    for name in ("initial", "where"):
        if name in keywords:
            raise TypeError(f"CuPy's reductions take no {name}")


class DeviceArray(NDArrayOperatorsMixin):
    """A stand-in for cupy.ndarray over an array of NumPy."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        assert method == "__call__"
        out = keywords.pop("out", None) or (None,)
        if out[0] is None:
            return device(ufunc(*host(inputs), **keywords))
        ufunc(*host(inputs), out=tuple(map(host, out)), **keywords)
        return out[0]

    def __getitem__(self, index: Any) -> Any:
        return device(self.values[host(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.values[host(index)] = host(value)

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self.values, name)
        if name == "T":
            return device(self.values.T)
        if name in TO_HOST:
            return getattr(self.values, name)
        if name not in METHODS:
            raise AttributeError(name)

        def method(*arguments: Any, **keywords: Any) -> Any:
            refuse(keywords)
            return device(getattr(self.values, name)(*host(arguments), **{k: host(v) for k, v in keywords.items()}))

        return method

    @property
    def data(self) -> Any:
        """A stand-in for CuPy's MemoryPointer."""

        def copy_from_device_async(source: Any, size: int) -> None:
            self.values.reshape(-1).view(np.uint8)[:size] = source.bytes[:size]

        return types.SimpleNamespace(
            bytes=self.values.reshape(-1).view(np.uint8), copy_from_device_async=copy_from_device_async
        )

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Any:
        return map(device, self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __int__(self) -> int:
        return int(self.values)

    def __float__(self) -> float:
        return float(self.values)

    def get(self) -> Any:
        return self.values.copy()


@cache
def compiled(code: str, expressions: tuple[str, ...]) -> Module:
    return Module(code, expressions)


class RawModule:
    """A stand-in for cupy.RawModule. It runs one order of threads; other tests try all."""

    def __init__(self, code: str, options: Any, name_expressions: Any) -> None:
        self._module = compiled(code, tuple(name_expressions)).under(Conditions("random", guard=None))

    def get_function(self, name: str) -> Callable[..., None]:
        function = self._module(name)

        def launch(grid: Any, block: Any, arguments: Any) -> None:
            function(grid, block, tuple(map(host, arguments)))

        return launch


class CudaError(RuntimeError):
    """A stand-in for cupy.cuda.runtime.CUDARuntimeError."""


class StrictCupy:
    """A stand-in for the module cupy on a machine with one device."""

    RawModule = RawModule
    ndarray = DeviceArray

    def __init__(self, free: int = FREE) -> None:
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CudaError, getDeviceCount=lambda: 1, memGetInfo=lambda: (free, TOTAL)
        )
        nvrtc = types.SimpleNamespace(getVersion=lambda: (13, 0))
        event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.cuda = types.SimpleNamespace(
            runtime=runtime, nvrtc=nvrtc, cublas=object(), Event=lambda: event, get_elapsed_time=lambda _a, _b: 2.0
        )

    def get_default_memory_pool(self) -> Any:
        return types.SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: None)

    def __getattr__(self, name: str) -> Any:
        found = getattr(PoisonedNumpy(), name)
        if not callable(found) or isinstance(found, type):
            return found

        def function(*arguments: Any, **keywords: Any) -> Any:
            refuse(keywords)
            first = arguments[0] if arguments else None
            if name in CREATES and not isinstance(first, DeviceArray):
                return device(np.array(host_or_list(first), *arguments[1:], **keywords))
            return device(found(*host(arguments), **{k: host(v) for k, v in keywords.items()}))

        return function


def host_or_list(x: Any) -> Any:
    """An argument of `asarray` other than CuPy's arrays: NumPy's arrays, numbers, and lists of numbers."""
    assert not isinstance(x, list | tuple) or not any(isinstance(item, DeviceArray) for item in x), "one by one"
    return x


def install(monkeypatch: Any, free: int = FREE) -> StrictCupy:
    """Let refmoe find the stand-in as CuPy. Steps are run instead of graphs."""
    from refmoe.cuda import cupy_ops, decode, place

    cupy = StrictCupy(free)
    for module in (place, cupy_ops):
        monkeypatch.setattr(module, "require_gpu", lambda: cupy)
    monkeypatch.setattr(cupy_ops, "compiled", cache(cupy_ops.compiled.__wrapped__))
    monkeypatch.setattr(decode, "captured", lambda _cupy, step: step)
    return cupy
