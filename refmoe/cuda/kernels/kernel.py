# SPDX-License-Identifier: Apache-2.0
"""The host's description of a kernel: a name in a file, its arguments, its launch and its limits.

A launch is checked against that description, so that a wrong dtype, shape or layout is an error in Python and not a
wrong number from the device. CuPy's RawModule and the CPU runner of the tests are launched in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

Sizes = Mapping[str, int]
"""The sizes of dimensions by name, as the shapes of a launch's arrays give them."""
GetFunction = Callable[[str], Callable[..., None]]
"""From a name expression such as ``route<float>`` to a function of (grid, block, arguments): RawModule.get_function."""

C_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}
"""The dtypes that `T` and `W` may stand for, and their names in the text."""
STORED = tuple(C_TYPES)
WARP = 32
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
"""CUDA C++ Programming Guide, technical specifications per compute capability, all since 3.0."""


def blocks_of(count: int, size: int) -> int:
    """The number of blocks of `size` that hold `count` elements."""
    return -(-count // size)


@dataclass(frozen=True)
class Kernel:
    """One `__global__` function.

    arguments: in order, by name. ``"T[tokens, experts]"`` is a C-contiguous array of that shape and of the launch's
        dtype T (or of a fixed dtype). ``"int32"`` is a number. A number with the name of a dimension is taken from the
        shapes.
    """

    file: str
    name: str
    arguments: Mapping[str, str]
    block: int
    grid: Callable[[Sizes], tuple[int, ...]]
    registers: int  # the most registers per thread, on every architecture
    dtypes: tuple[str, ...] = ()  # the dtypes that T may be; none if the kernel is no template
    limits: Mapping[str, int] = field(default_factory=dict)  # the largest value of a dimension

    @property
    def expressions(self) -> tuple[str, ...]:
        """Every instance, as NVRTC's name expressions."""
        return tuple(self.expression(dtype) for dtype in self.dtypes) or (self.name,)

    def expression(self, dtype: str | None) -> str:
        """The instance for one dtype."""
        return self.name if dtype is None else f"{self.name}<{C_TYPES[dtype]}>"

    def launch(self, get_function: GetFunction, **values: Any) -> None:
        """Check the arguments and launch, unless the grid is empty.

        values: every array, and every number that is not a dimension. Raises ValueError for a wrong value.
        """
        dtype, sizes = self._measure(values)
        grid = self.grid(sizes)
        for blocks, most in zip(grid, MOST_BLOCKS, strict=False):
            if blocks > most:
                raise ValueError(f"{self.name}: a grid of {grid} blocks is more than CUDA launches")
        if not prod(grid):
            return
        numbers = {**sizes, **values}
        arguments = tuple(
            values[name] if "[" in kind else np.dtype(kind).type(numbers[name]) for name, kind in self.arguments.items()
        )
        get_function(self.expression(dtype))(grid, (self.block,), arguments)

    def _measure(self, values: Mapping[str, Any]) -> tuple[str | None, dict[str, int]]:
        """The dtype T and the dimensions, from the arrays. Raises ValueError where the arrays do not agree."""
        arrays = {name: parse(kind) for name, kind in self.arguments.items() if "[" in kind}
        needed = set(self.arguments) - {dimension for _, dimensions in arrays.values() for dimension in dimensions}
        wrong = (needed - set(values)) | (set(values) - needed)
        if wrong:
            raise ValueError(f"{self.name}: argument {min(wrong)} is missing or unknown")
        dtype = next((str(values[name].dtype) for name, (wanted, _) in arrays.items() if wanted == "T"), None)
        if dtype is not None and dtype not in self.dtypes:
            raise ValueError(f"{self.name}: T is {dtype}, but there are only {', '.join(self.dtypes)}")
        for name, (wanted, dimensions) in arrays.items():
            self._check_array(name, values[name], dtype if wanted == "T" else wanted, len(dimensions))
        pairs = [
            (name, dimension, size)
            for name, (_, dimensions) in arrays.items()
            for dimension, size in zip(dimensions, values[name].shape, strict=True)
        ]
        sizes: dict[str, int] = {}
        for _, dimension, size in pairs:
            if dimension.isidentifier():
                sizes.setdefault(dimension, size)
        for name, dimension, size in pairs:
            if evaluate(dimension, sizes) != size:
                kind, shape = self.arguments[name], values[name].shape
                raise ValueError(
                    f"{self.name}: {name} {shape} is not {kind} with {dimension} = {evaluate(dimension, sizes)}"
                )
        for dimension, most in self.limits.items():
            if sizes[dimension] > most:
                raise ValueError(f"{self.name}: {dimension} is {sizes[dimension]}, more than {most}")
        return dtype, sizes

    def _check_array(self, name: str, array: Any, dtype: str | None, axes: int) -> None:
        """Raises ValueError unless the array has this dtype and number of axes and is C-contiguous."""
        if str(array.dtype) != dtype or array.ndim != axes or not array.flags.c_contiguous:
            layout = "" if array.flags.c_contiguous else ", not C-contiguous"
            kind = self.arguments[name].replace("T[", f"{dtype}[")
            raise ValueError(f"{self.name}: {name} is {array.dtype} {array.shape}{layout}, not {kind}")


def parse(kind: str) -> tuple[str, list[str]]:
    """``"T[rows, 2*half]"`` as ``("T", ["rows", "2*half"])``."""
    found = re.fullmatch(r"(\w+)\[(.+)\]", kind)
    assert found, kind
    return found[1], [dimension.strip() for dimension in found[2].split(",")]


def evaluate(dimension: str, sizes: Sizes) -> int:
    """The value of a sum of products of numbers and names, such as ``2*half`` and ``experts+1``."""
    return sum(
        prod(int(factor) if factor.isdigit() else sizes[factor] for factor in term.split("*"))
        for term in dimension.split("+")
    )
