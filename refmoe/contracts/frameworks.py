# SPDX-License-Identifier: Apache-2.0
"""Copies of NumPy arrays in a subject's own framework, and back, through DLPack where possible."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.contracts.formats import Floats, Format, Ints
from refmoe.errors import InputError, require


def to_framework(values: Floats | Ints, form: Format, framework: str) -> Any:
    """A new array of the framework with these values, which are numbers of the format, or integers."""
    array = np.array(values) if values.dtype.kind in "iu" else values.astype(form.dtype)
    if framework == "numpy":
        return array
    if framework == "torch":
        torch = require("torch", "engines", "a function that takes tensors of torch")
        if array.dtype.kind in "iu":
            return torch.from_dlpack(array)
        # float64 holds every number of the four formats, and DLPack does not know NumPy's bfloat16
        return torch.from_dlpack(values.astype(np.float64)).to(getattr(torch, form.name))
    if framework == "jax":
        jax = installed("jax")
        if form.name == "float64" and not jax.config.jax_enable_x64:
            raise InputError(
                "jax computes in float32 where float64 is declared: set jax_enable_x64, or declare float32"
            )
        return installed("jax.numpy").asarray(array)
    if framework == "cupy":
        return installed("cupy").asarray(array)
    raise InputError(f"framework '{framework}' is unknown, one of numpy, torch, jax, cupy was expected")


def installed(module: str) -> Any:
    """A framework that no extra of refmoe brings."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"a function that takes arrays of {module.split('.')[0]} needs that package, which is not installed"
        ) from error


def to_numpy(array: Any) -> NDArray[Any]:
    """The values as int64, float64 or booleans. Raises TypeError for anything but an array of numbers."""
    if type(array).__module__.startswith("torch"):
        array = array.detach().cpu()
        array = np.from_dlpack(array.double() if array.is_floating_point() else array.long())
    elif type(array).__module__.startswith("cupy"):
        array = array.get()
    elif not isinstance(array, np.ndarray) and hasattr(array, "__dlpack__") and not hasattr(array, "__array__"):
        array = np.from_dlpack(array)
    array = np.asarray(array)
    if array.dtype.kind in "iu":
        return np.array(array, dtype=np.int64)
    if array.dtype.kind == "b":
        return np.array(array)
    if array.dtype.kind in "fV":  # V: the formats of ml_dtypes, as some versions of NumPy describe them
        return np.array(array).astype(np.float64)
    raise TypeError(f"an array of numbers was expected, not one of {array.dtype}")
