# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF file, and the places of its tensors.

The package gguf parses, and this module holds it to the file. By itself the package believes each length in the file:
an array of 2^60 elements would fill the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.errors import InputError, require
from refmoe.files.foreign import foreign_parser
from refmoe.files.reading import need_file
from refmoe.files.sentences import quoted

EXPECTED = "a GGUF file"
TOKENIZER = "tokenizer."
"""The beginning of the names of the tokenizer's fields."""
LONGEST = 1 << 22
"""The most elements of an array in the metadata. The largest vocabularies have a tenth of this number."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type, and its place in the file."""

    path: Path
    name: str
    kind: str
    """ggml's name of the type, such as ``"Q4_K"``."""
    shape: tuple[int, ...]
    """Slowest axis first, as NumPy has it."""
    offset: int
    """Of the first byte, from the beginning of the file."""
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The metadata and the tensors of a file."""

    path: Path
    values: dict[str, Any]
    """Name to value, without the tokenizer's."""
    tensors: dict[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file. No tensor is read.

    Raises InputError when the package gguf is not installed, or the file is missing, cut short or big-endian. Tensors
    must follow each other.
    """
    gguf: Any = require("gguf", "llama-cpp", "reading a GGUF file")
    size = need_file(path, EXPECTED)
    with foreign_parser(path, EXPECTED):
        reader = _reader(gguf)(path)
        if reader.byte_order != "I":
            raise InputError(f"{path}: has the other byte order, but a little-endian GGUF file was expected")
        fields = {name: field for name, field in reader.fields.items() if not name.startswith(TOKENIZER)}
        values = {name: field.contents() for name, field in fields.items()}
        sizes = {kind.name: pair for kind, pair in gguf.GGML_QUANT_SIZES.items()}
        end, alignment = int(reader.data_offset), int(reader.alignment)
        tensors = {}
        for found in reader.tensors:
            block, block_bytes = sizes[found.tensor_type.name]
            shape = tuple(int(axis) for axis in reversed(found.shape.tolist()))
            tensor = GgufTensor(
                path=path, name=found.name, kind=found.tensor_type.name, shape=shape, offset=int(found.data_offset),
                nbytes=math.prod(shape) // block * block_bytes,
            )  # fmt: skip
            _check(tensor, block, end, size)
            end = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
            tensors[found.name] = tensor
    return GgufFile(path, values, tensors)


def tokenizer_fields(path: Path) -> dict[str, Any]:
    """The fields of the tokenizer in the metadata of a GGUF file, by their full names. Raises InputError."""
    gguf: Any = require("gguf", "llama-cpp", "reading a GGUF file")
    need_file(path, EXPECTED)
    with foreign_parser(path, EXPECTED):
        fields = _reader(gguf)(path).fields
        return {name: field.contents() for name, field in fields.items() if name.startswith(TOKENIZER)}


def _check(tensor: GgufTensor, block: int, start: int, size: int) -> None:
    """Raises InputError for a tensor that has no whole blocks, or does not lie where it must.

    start: where the tensor before it ends, padded   size: of the file
    """
    where = f"{tensor.path}: tensor {quoted(tensor.name)}"
    if not tensor.shape or tensor.shape[-1] % block:
        raise InputError(f"{where} has shape {list(tensor.shape)}, but rows of whole blocks of {block} were expected")
    if tensor.offset != start:
        raise InputError(f"{where} begins at byte {tensor.offset}, but byte {start} was expected")
    if tensor.offset + tensor.nbytes > size:
        raise InputError(f"{where} ends at byte {tensor.offset + tensor.nbytes}, but the file has {size} bytes")


def _reader(gguf: Any) -> Any:
    """The package's reader, with its two ways to read bytes held to the file."""

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"the file ends before {int(count)} elements at byte {int(offset)}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY:
                (length,) = self._get(orig_offs + 4, "<u8")
                if length > LONGEST:
                    raise ValueError(f"an array has {length} elements, but at most {LONGEST} were expected")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader
