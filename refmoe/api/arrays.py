"""Arrays of other libraries as NumPy arrays, with their dtype and without a copy where that is possible."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.errors import InputError

REAL = ("float64", "float32", "float16", "bfloat16")
"""The dtypes of values."""


def to_numpy(value: Any, name: str) -> NDArray[Any]:
    """A value of NumPy, PyTorch, JAX, CuPy or MLX as a NumPy array.

    name: of the value, for messages
    PyTorch tensors may lie on any device and may need a gradient. Lists of numbers become float64.
    Raises InputError for a value that is no array of numbers, or whose dtype is not supported.
    """
    array = _convert(value, name)
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if str(array.dtype) not in REAL:
        raise InputError(f"{name}: the dtype is {array.dtype}, but one of {', '.join(REAL)} or integers was expected")
    return array


def _convert(value: Any, name: str) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    library = type(value).__module__.partition(".")[0]
    if library == "torch":
        return _from_torch(value)
    if library == "cupy":
        return np.asarray(value.get())
    if library == "mlx":
        return _from_mlx(value)
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: is no array: {error}") from None
    if array.dtype == object or array.dtype.kind not in "fiubV" or array.dtype.kind == "b":
        raise InputError(f"{name}: is {type(value).__name__}, but an array of numbers was expected")
    return array


def _from_torch(tensor: Any) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        bits: NDArray[Any] = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _from_mlx(array: Any) -> NDArray[Any]:
    if str(array.dtype).endswith("bfloat16"):
        import mlx.core

        return np.array(array.view(mlx.core.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)
