# SPDX-License-Identifier: Apache-2.0
"""Values in files: ``.npz``, ``.pt``, and safetensors with or without the header of a trace. Nothing is unpickled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.api.arguments import kind, ordinary_file
from refmoe.errors import InputError, require
from refmoe.files.safetensors_file import one_line, open_safetensors
from refmoe.traces.trace import Trace, read_trace

TORCH_FILES = (".pt", ".pth", ".bin")


def read_values(path: Path) -> Trace | Mapping[str, Any]:
    """The trace in a file, or the arrays of a file that is no trace.

    Raises InputError when the file cannot be read, or when its arrays could be read only by running code from it.
    """
    if path.suffix == ".npz":
        return _npz(ordinary_file(path))
    if path.suffix in TORCH_FILES:
        return _tensors(_weights_only(ordinary_file(path)), path)
    if path.suffix == ".safetensors":
        tensors, metadata = open_safetensors(path)
        if "refmoe" not in metadata:
            return {name: tensor.get() for name, tensor in tensors.items()}
    return read_trace(path)


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _with_bfloat16(file[name]) for name in file.files}
    except Exception as error:  # of zipfile, zlib and NumPy, and for a single array, which is no context
        raise InputError(f"{path}: not a readable .npz file without pickled objects: {one_line(error)}") from None


def _with_bfloat16(array: Any) -> Any:
    """NumPy writes bfloat16 as two nameless bytes; no other dtype of an engine becomes that."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _weights_only(path: Path) -> Any:
    torch: Any = require("torch", "engines", "reading a file of PyTorch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle.UnpicklingError, RuntimeError, EOFError, ...
        first = one_line(str(error).partition("\n")[0])
        raise InputError(
            f"{path}: torch cannot read it, but a dictionary of tensors without other objects was expected: {first}"
        ) from None


def _tensors(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds {kind(content)}, but a dictionary of tensors by tap was expected")
    return dict(content)
