# SPDX-License-Identifier: Apache-2.0
"""Traces that are held in memory and have no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from refmoe.traces.trace import Header, Trace

SAFETENSORS_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
}  # fmt: skip


@dataclass(frozen=True)
class HeldTensor:
    """An array in memory, with the interface of a tensor in a trace file."""

    name: str
    array: NDArray[Any]

    @property
    def dtype(self) -> str:
        return SAFETENSORS_NAMES[str(self.array.dtype)]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def map(self) -> NDArray[Any]:
        return self.array

    def get(self, _file: bytes | None = None) -> NDArray[Any]:
        return self.array


def held_trace(header: Header, arrays: dict[str, NDArray[Any]], name: str = "memory") -> Trace:
    """A trace that is held in memory and has no file."""
    tensors: Any = {key: HeldTensor(key, array) for key, array in arrays.items()}
    return Trace(Path(name), header, tensors)
