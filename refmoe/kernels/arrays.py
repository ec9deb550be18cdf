# SPDX-License-Identifier: Apache-2.0
"""Arrays that kernels are given, in every shape that memory allows, and what they return."""

from __future__ import annotations

import mmap
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.contracts.broken import LawBroken, Malformed, first_line
from refmoe.contracts.formats import Floats, Format
from refmoe.contracts.frameworks import to_framework, to_numpy

FAR = 1 << 30
"""The distance in elements of two experts' matrices that lie far apart: the third begins at 2^31."""


def integers(values: NDArray[Any], dtype: str, form: Format, framework: str) -> Any:
    """Integers as an array of a framework."""
    return to_framework(values.astype(dtype), form, framework)


def strided(values: Floats, form: Format, framework: str) -> Any:
    """The values as every second element of the last axis of an array, with NaN between them."""
    wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan)
    wide[..., ::2] = values
    return to_framework(wide, form, framework)[..., ::2]


def repeated_rows(values: Floats, form: Format, framework: str) -> Any:
    """One row as many: all rows lie at the same place in memory.   values: [n, m], of which the first row counts"""
    row = to_framework(values[:1], form, framework)
    if framework == "numpy":
        return np.broadcast_to(row, values.shape)
    return row.expand(*values.shape) if framework == "torch" else to_framework(values, form, framework)


def reserved(size: int) -> mmap.mmap | None:
    """A range of addresses of so many bytes, or None. Only pages that are written take memory."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return None
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        return mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError, ValueError):
        return None


@lru_cache(maxsize=8)
def can_reserve(count: int, itemsize: int) -> bool:
    """Whether there is a range of addresses for `count` matrices that lie `FAR` elements apart."""
    found = reserved(count * FAR * itemsize)
    if found is None:
        return False
    found.close()
    return True


def far_apart(values: Floats, form: Format, framework: str) -> Any:
    """Matrices [E, rows, columns] that lie `FAR` elements apart, where `can_reserve` says that this is possible."""
    count, rows, columns = values.shape
    size = ((count - 1) * FAR + rows * columns) * form.dtype.itemsize
    addresses = reserved(size)
    assert addresses is not None
    memory = np.frombuffer(addresses, dtype=form.dtype)
    for number, matrix in enumerate(values):
        memory[number * FAR : number * FAR + rows * columns] = matrix.astype(form.dtype).reshape(-1)
    step = form.dtype.itemsize
    if framework == "torch":
        import torch

        bits = np.dtype(f"i{step}")
        flat = torch.from_numpy(memory.view(bits)).view(getattr(torch, form.name))
        return torch.as_strided(flat, values.shape, (FAR, columns, 1))
    return np.lib.stride_tricks.as_strided(memory, values.shape, (FAR * step, columns * step, step))


def returned(answer: Any, shape: tuple[int, ...]) -> Floats:
    """A result as float64. Raises Malformed unless it is an array of floating-point numbers of this shape."""
    if isinstance(answer, tuple | list):
        raise Malformed(f"found {type(answer).__name__} of {len(answer)}, one array was expected")
    try:
        found = to_numpy(answer)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of the user's own array class
        raise Malformed(f"the result is no array: {first_line(error)}") from error
    if found.dtype.kind != "f":
        raise Malformed(f"found {found.dtype}, floating-point numbers were expected")
    if found.shape != shape:
        raise Malformed(f"found shape {list(found.shape)}, {list(shape)} was expected")
    return np.asarray(found, dtype=np.float64)


def own_dtype(answer: Any) -> NDArray[Any]:
    """A result as a NumPy array of its own dtype, bfloat16 included."""
    values = to_numpy(answer)
    name = str(answer.dtype).rpartition(".")[2]
    if name == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(np.dtype(name)) if name in ("float16", "float32") else values


def same(found: Floats, expected: Floats) -> NDArray[np.bool_]:
    """Where two arrays have the same numbers; NaN is like NaN, and -0 like 0."""
    return np.asarray((found == expected) | (np.isnan(found) & np.isnan(expected)))


def check_exact(found: Floats, expected: Floats, words: str = "") -> None:
    """Raises LawBroken, with the first wrong element, unless both are the same.   words: end the sentence"""
    wrong = ~same(found, expected)
    if not wrong.any():
        return
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    names = ("token", "column") if found.ndim == 2 else ("sequence", "head", "column")
    where = ", ".join(f"{name} {index}" for name, index in zip(names, place, strict=True))
    raise LawBroken(
        f"{int(wrong.sum())} of {wrong.size} values are wrong; at {where} found {float(found[place])!r}, expected "
        f"{float(expected[place])!r} exactly{words}",
        place[0],
    )
