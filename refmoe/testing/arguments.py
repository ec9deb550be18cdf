# SPDX-License-Identifier: Apache-2.0
"""The arrays of a call, checked where they enter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from refmoe.api.arrays import to_numpy
from refmoe.errors import InputError


def real(value: Any, name: str) -> NDArray[Any]:
    """An array of real numbers in its own dtype. Raises InputError for any other."""
    array = to_numpy(value, name)
    if array.dtype.kind == "i":
        raise InputError(f"{name}: has dtype {array.dtype}, but floating-point numbers were expected")
    return array


def integers(value: Any, name: str) -> NDArray[Any]:
    """An array of integers as int64. Raises InputError for any other."""
    array = to_numpy(value, name)
    if array.dtype.kind != "i":
        raise InputError(f"{name}: has dtype {array.dtype}, but integers were expected")
    return array


def fit(
    arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, str], sizes: dict[str, int] | None = None
) -> dict[str, int]:
    """The size of each letter of the shapes, such as ``{"x": "T K", "w": "N K"}``.

    A number among the letters stands for itself.   sizes: of letters that are known before
    Raises InputError when an array has another number of axes, or a letter two sizes.
    """
    sizes = dict(sizes or {})
    first: dict[str, str] = {letter: "the call" for letter in sizes}
    for name, text in shapes.items():
        letters, shape = text.split(), arrays[name].shape
        if len(letters) != len(shape):
            raise InputError(f"{name}: has shape {list(shape)}, but [{', '.join(letters)}] was expected")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                wanted = ", ".join(str(sizes.get(each, each)) for each in letters)
                raise InputError(
                    f"{name}: has shape {list(shape)}, but [{wanted}] was expected, as {first[letter]} has "
                    f"{letter} = {sizes[letter]}"
                )
            first.setdefault(letter, name)
    return sizes
