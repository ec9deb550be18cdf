# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries as NumPy arrays, with their dtype and without a copy where that is possible."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.formats import OF_DTYPE
from refmoe.errors import InputError
from refmoe.files.sentences import one_line

REAL = ("float64", "float32", "float16", "bfloat16")
"""The dtypes of values."""


def to_numpy(value: Any, name: str) -> NDArray[Any]:
    """A value of NumPy, PyTorch, JAX, CuPy or MLX as a NumPy array.

    name: of the value, for messages
    PyTorch tensors may lie on any device, may need a gradient and may be strided. Lists of floats become float64.
    Integers of any width become int64, as the choice of experts has them.
    Raises InputError for a value that is no array of numbers, or whose dtype is not supported.
    """
    array = _convert(value, name)
    if array.dtype in OF_DTYPE:
        return array
    if array.dtype.kind in "iu":
        return _int64(array, name)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype not in OF_DTYPE:
        raise InputError(f"{name}: the dtype is {array.dtype}, but one of {', '.join(REAL)} or integers was expected")
    return array


def libraries_of(value: object) -> set[str]:
    """The packages of a value's type and of its bases: a subclass of a tensor is a tensor."""
    return {base.__module__.partition(".")[0] for base in type(value).__mro__}


def _convert(value: Any, name: str) -> NDArray[Any]:
    libraries = set() if type(value) is np.ndarray else libraries_of(value)
    try:
        if "torch" in libraries:
            array = from_torch(value)
        elif "cupy" in libraries:
            array = np.asarray(value.get())
        elif "mlx" in libraries:
            array = _from_mlx(value)
        else:
            array = np.asarray(value)
    except Exception as error:  # the error of any library, such as one for a sparse tensor or a traced array
        raise InputError(f"{name}: cannot be read as an array of numbers: {one_line(error)}") from None
    if array.dtype.kind not in "fiuV":
        raise InputError(f"{name}: is {type(value).__name__} of {array.dtype}, but an array of numbers was expected")
    return array


def _int64(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 1 << 63:
        raise InputError(f"{name}: has {int(array.max())} in it, but numbers of experts were expected")
    return array.astype(np.int64)


def from_torch(tensor: Any) -> NDArray[Any]:
    """A tensor of PyTorch as a NumPy array of the same dtype, without a copy where it lies on the CPU."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        bits: NDArray[Any] = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _from_mlx(array: Any) -> NDArray[Any]:
    if str(array.dtype).endswith("bfloat16"):
        bits = array.view(import_module("mlx.core").uint16)
        return np.array(bits).view(ml_dtypes.bfloat16)
    return np.array(array)
