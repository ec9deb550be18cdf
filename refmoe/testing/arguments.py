# SPDX-License-Identifier: Apache-2.0
"""The arrays of a call, checked where they enter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arguments import shown
from refmoe.api.arrays import libraries_of, to_numpy
from refmoe.errors import InputError


def real(value: Any, name: str) -> NDArray[Any]:
    """An array of real numbers in its own dtype. Raises InputError for any other."""
    array = to_numpy(value, name)
    if array.dtype.kind == "i":
        raise InputError(f"{name}: has dtype {array.dtype}, but floating-point numbers were expected")
    return array


def integers(value: Any, name: str, truths: bool = False) -> NDArray[Any]:
    """An array of integers as int64. Raises InputError for any other.   truths: whether True and False will do"""
    if truths and "bool" in str(getattr(value, "dtype", "")):
        value = value.int() if "torch" in libraries_of(value) else value.astype("int32")
    array = to_numpy(value, name)
    if array.dtype.kind != "i":
        raise InputError(f"{name}: has dtype {array.dtype}, but integers were expected")
    return array


def flags(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """An option that is True or False. Raises InputError for any other value."""
    value = given.get(name, default)
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name}: is {shown(value)}, but True or False was expected")
    return bool(value)


def one_of(given: Mapping[str, Any], name: str, choices: Sequence[str | None]) -> str | None:
    """An option that is one of some words; the first is its default. Raises InputError for any other value."""
    value = given.get(name, choices[0])
    if not isinstance(value, str | None) or value not in choices:
        raise InputError(f"{name}: is {shown(value)}, but one of {', '.join(map(repr, choices))} was expected")
    return value


def number(given: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
    """An option that is a finite number. Raises InputError for any other value."""
    value = given.get(name, default)
    return default if value is None else finite(value, name)


def finite(value: Any, name: str) -> float:
    """A finite number. Raises InputError for any other value."""
    try:
        converted = math.nan if isinstance(value, bool | str) else float(value)
    except Exception:  # that of any array library
        converted = math.nan
    if not math.isfinite(converted):
        raise InputError(f"{name}: is {shown(value)}, but a finite number was expected")
    return converted


def fit(
    arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, str], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The size of each letter of the shapes, such as ``{"x": "T K", "w": "N K"}``.

    sizes: of letters that are known before
    Raises InputError when an array has another number of axes, or a letter two sizes.
    """
    known = dict(sizes or {})
    first: dict[str, str] = dict.fromkeys(known, "the call")
    for name, text in shapes.items():
        letters, shape = text.split(), arrays[name].shape
        if len(letters) != len(shape):
            raise InputError(f"{name}: has shape {list(shape)}, but [{', '.join(letters)}] was expected")
        for letter, size in zip(letters, shape, strict=True):
            if known.setdefault(letter, size) != size:
                wanted = ", ".join(str(known.get(each, each)) for each in letters)
                raise InputError(
                    f"{name}: has shape {list(shape)}, but [{wanted}] was expected: {first[letter]} has "
                    f"{letter} = {known[letter]}"
                )
            first.setdefault(letter, name)
    return known


def flat(array: NDArray[Any]) -> NDArray[Any]:
    """Rows: [..., n] as [T, n]; a vector is one row."""
    if not array.ndim:
        return array
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
