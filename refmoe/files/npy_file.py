# SPDX-License-Identifier: Apache-2.0
"""Arrays in NumPy's own files. Nothing is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

from refmoe.errors import InputError
from refmoe.files.foreign import by_name, foreign_parser
from refmoe.files.reading import open_file
from refmoe.files.sentences import quoted


def is_npy(path: Path) -> bool:
    """Whether the file begins as a .npy file does. Raises InputError when it cannot be read."""
    with open_file(path, "a .npy file or a trace") as file:
        return file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX


def map_npy(path: Path) -> NDArray[Any]:
    """The array of a .npy file, mapped read-only. Raises InputError when the file is not one, or has objects."""
    with open_file(path, "a .npy file"):
        pass  # what cannot be read is refused here
    with foreign_parser(path, "a .npy file of numbers"):
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.asarray(array)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file, by name. Raises InputError when the file is not one, or has objects."""
    with open_file(path, "a .npz file"):
        pass
    with foreign_parser(path, "a .npz file without pickled objects"), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    # NumPy gives the bytes of a member that is no array
    other = next((name for name, array in arrays.items() if not isinstance(array, np.ndarray)), None)
    if other is not None:
        raise InputError(
            f"{path}: {quoted(other)} is no array, but only arrays of NumPy were expected in a .npz file{by_name(path)}"
        )
    return arrays
