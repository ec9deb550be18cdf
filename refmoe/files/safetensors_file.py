# SPDX-License-Identifier: Apache-2.0
"""Tensors of a safetensors file, as read-only views of the mapped file.

The safetensors library checks the file: header, offsets, overlaps, length. Its NumPy front end would then copy each
tensor. A 90 GB checkpoint must not be copied, so this module maps the checked offsets instead.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from refmoe.errors import InputError
from refmoe.files.foreign import other_format
from refmoe.files.parsing import strict_json
from refmoe.files.reading import open_file
from refmoe.files.sentences import one_line, quoted

SMALL = 1 << 16
"""The largest tensor, in bytes, that is read rather than mapped."""

EXPECTED = "a safetensors file"

DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
"""NumPy dtypes by their names in the safetensors format."""
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
"""The names of the dtypes in the safetensors format."""
WRITTEN = CODES | {np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3"}
"""The names of those that are written. What a float of eight bits stands for, only its scale tells."""
_MAPPINGS: WeakValueDictionary[tuple[int, int, int, int], mmap.mmap] = WeakValueDictionary()
"""The mapped files by device, inode, size and time of change."""
_LOCK = threading.Lock()
"""Held by the thread that looks up or adds a mapped file."""


View = Callable[[NDArray[Any]], NDArray[Any]]
"""From a stored tensor to a part of it, or to its values in another order."""
RowReader = Callable[[int, int], NDArray[Any]]
"""From start and stop to rows [start, stop), as a copy."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its place in the file, and on demand its values."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def map(self) -> NDArray[Any]:
        """The values, mapped read-only. Raises InputError when the dtype has no NumPy counterpart."""
        if self.dtype not in DTYPES:
            raise InputError(
                f"{self.path}: tensor {quoted(self.name)} has dtype {self.dtype}, "
                f"but one of {', '.join(DTYPES)} was expected"
            )
        if 0 in self.shape:
            return np.zeros(self.shape, DTYPES[self.dtype])
        try:
            return self._shaped(np.frombuffer(_mapping(self.path), np.uint8, self.nbytes, self.offset))
        except (OSError, ValueError) as error:
            raise self.gone(error) from None

    def get(self, file: bytes | None = None) -> NDArray[Any]:
        """The values, read-only. Up to `SMALL` bytes are read, which is several times faster than to map them.

        file: the bytes of the whole file, if the caller has them.
        Raises InputError when the dtype has no NumPy counterpart or the file can no longer be read.
        """
        if file is not None and self.dtype in DTYPES and len(file) >= self.offset + self.nbytes > self.offset:
            return self._shaped(np.frombuffer(file, np.uint8, self.nbytes, self.offset))
        if self.dtype not in DTYPES or not 0 < self.nbytes <= SMALL:
            return self.map()
        try:
            return self._shaped(self._read())
        except OSError as error:
            raise self.gone(error) from None

    def rows_of(self, view: View) -> RowReader:
        """A function of start and stop that returns rows [start, stop) of a view of the tensor, as a copy.

        view: cuts a part out of the tensor, or reorders it. It is called once, unless it reorders.
        The function raises InputError when the rows can no longer be read.
        """
        return FileRows(self, view)

    def gone(self, error: Exception) -> InputError:
        """The error for values that can no longer be read."""
        return InputError(f"{self.path}: tensor {quoted(self.name)} can no longer be read: {one_line(error)}")

    def _shaped(self, raw: NDArray[Any]) -> NDArray[Any]:
        stored: NDArray[Any] = raw.view(DTYPES[self.dtype])
        return stored.reshape(self.shape)

    def _read(self) -> NDArray[Any]:
        """The bytes of the tensor, read-only. Raises OSError when the file has become too short."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            data = file.read(self.nbytes)
        if len(data) < self.nbytes:
            raise OSError(f"the file has become too short: {len(data)} of {self.nbytes} bytes are left")
        return np.frombuffer(data, np.uint8)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(np.dtype(DTYPES[self.dtype]).itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


class FileRows:
    """Rows of a view of a tensor. Contiguous rows are read, not mapped.

    Reading takes only the memory of the rows, and reports a file that has vanished or was cut short.
    """

    def __init__(self, tensor: StoredTensor, view: View) -> None:
        self._tensor, self._view = tensor, view

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop), as a copy. Raises InputError when they can no longer be read."""
        if self._place is None:
            return self._view(self._tensor.map())[start:stop].copy()
        offset, shape, dtype = self._place
        chosen = range(shape[0])[start:stop]
        values = np.empty((len(chosen), *shape[1:]), dtype)
        target = values.reshape(-1).view(np.uint8).data
        try:
            with open(self._tensor.path, "rb", buffering=0) as file:
                # no read-ahead: it would fetch bytes that other readers want, or nobody
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM) if hasattr(os, "posix_fadvise") else None
                file.seek(offset + chosen.start * math.prod(shape[1:]) * dtype.itemsize)
                _fill(file, target)
        except OSError as error:
            raise self._tensor.gone(error) from None
        return values

    @cached_property
    def _place(self) -> tuple[int, tuple[int, ...], np.dtype[Any]] | None:
        """Where the rows begin in the file, their shape and dtype. None for values in another order than the file's."""
        mapped = self._tensor.map()
        rows = self._view(mapped)
        offset = rows.__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
        if not (0 <= offset < mapped.nbytes and rows.flags.c_contiguous):
            return None
        return self._tensor.offset + offset, rows.shape, rows.dtype


def _fill(file: RawIOBase, target: memoryview) -> None:
    """Read until the target is full, as one call may return less. Raises OSError when the file ends too early."""
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise OSError(f"the file has become too short: {done} of {len(target)} bytes are left")
        done += count


def _mapping(path: Path) -> mmap.mmap:
    """The whole file, mapped read-only. All tensors of one file share it, as long as one of them is in use.

    Each mapping holds a file descriptor, and a process may have 1024. A checkpoint of 8x22B has more tensors.
    """
    with open(path, "rb") as file, _LOCK:
        facts = os.fstat(file.fileno())
        key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        found = _MAPPINGS.get(key)
        if found is None:
            found = _MAPPINGS[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return found


def open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Open a file and return its tensors by name, and its metadata.

    Raises InputError when the file is missing, is not safetensors, is cut short, or has two tensors of one name.
    """
    try:
        with open_file(path, EXPECTED) as file:
            with safe_open(path, framework="np") as checked:
                metadata = dict(checked.metadata() or {})
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = strict_json(file.read(length))
    except InputError:
        raise
    except (SafetensorError, ValueError, struct.error) as error:
        if found := other_format(path):
            raise InputError(f"{path}: is {found}, but {EXPECTED} was expected") from None
        if isinstance(error, SafetensorError):
            raise InputError(f"{path}: not a whole safetensors file: {one_line(error)}") from None
        raise InputError(f"{path}: the header of the safetensors file cannot be used: {one_line(error)}") from None
    header.pop("__metadata__", None)
    tensors = {
        name: StoredTensor(
            path=path,
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + length + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return tensors, metadata


def write_tensors(path: Path, arrays: Mapping[str, Callable[[], NDArray[Any]]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, with only one array in memory at a time. Equal arguments give equal bytes.

    arrays: by name, the function that gives an array whenever it is called

    The safetensors library writes several entries of metadata in an order of its own.   Raises OSError.
    """
    entries: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, read in arrays.items():
        array = read()
        entries[name] = {"dtype": WRITTEN[array.dtype], "shape": array.shape, "data_offsets": [0, array.nbytes]}
        sizes[name] = array.dtype.itemsize
    order = sorted(entries, key=lambda name: (-sizes[name], name))
    offset = 0
    for name in order:
        entries[name]["data_offsets"] = [offset, offset + entries[name]["data_offsets"][1]]
        offset = entries[name]["data_offsets"][1]
    table = {"__metadata__": dict(metadata)} | {name: entries[name] for name in order}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]()).reshape(-1).view(np.uint8).data)
