# SPDX-License-Identifier: Apache-2.0
"""Values in files: ``.npz``, ``.pt``, and safetensors with or without the header of a trace. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.api.arguments import kind
from refmoe.errors import InputError, require
from refmoe.files.foreign import foreign_parser
from refmoe.files.npy_file import read_npz
from refmoe.files.reading import need_file
from refmoe.files.safetensors_file import open_safetensors
from refmoe.traces.trace import Trace, read_trace

TORCH_FILES = (".pt", ".pth", ".bin")


def read_values(path: Path) -> Trace | Mapping[str, Any]:
    """The trace in a file, or the arrays of a file that is no trace.

    Raises InputError when the file cannot be read, or when its arrays could be read only by running code from it.
    """
    if path.suffix == ".npz":
        return {name: _with_bfloat16(array) for name, array in read_npz(path).items()}
    if path.suffix in TORCH_FILES:
        return _tensors(_weights_only(path), path)
    if path.suffix == ".safetensors":
        tensors, metadata = open_safetensors(path)
        if "refmoe" not in metadata:
            return {name: tensor.get() for name, tensor in tensors.items()}
    return read_trace(path)


def _with_bfloat16(array: Any) -> Any:
    """NumPy writes bfloat16 as two nameless bytes; no other dtype of an engine becomes that."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _weights_only(path: Path) -> Any:
    torch: Any = require("torch", "engines", "reading a file of PyTorch")
    need_file(path, "a file of tensors")
    with foreign_parser(path, "a dictionary of tensors without other objects"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _tensors(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds {kind(content)}, but a dictionary of tensors by tap was expected")
    return dict(content)
