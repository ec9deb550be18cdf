"""Matrices of middle size in memory that the system may map in huge pages.

Multiplying one token with a weight takes as long as reading it, and pages of 4 KiB slow that down by a fifth.
NumPy asks for huge pages for arrays of at least 4 MiB: a smaller one gets them by being a part of such an array.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np

HUGE_BY_ITSELF = 4 << 20
IN_CACHE_ANYWAY = 1 << 18
"""Bytes of an array below which it is left where it is: a core's cache keeps it from one use to the next."""
SLAB = 32 << 20
ALIGNMENT = 64


class Slabs:
    """Large arrays, one after another, of which each matrix gets the next part.

    One is freed when none of its parts is used any more.
    """

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)
        self._lock = Lock()  # experts ask for their weights side by side

    def settle(self, matrix: Any) -> Any:
        """The matrix, in a slab if that is of use."""
        if not IN_CACHE_ANYWAY <= matrix.nbytes < HUGE_BY_ITSELF:
            return matrix
        with self._lock:
            if len(self._left) < matrix.nbytes:
                self._left = np.empty(SLAB, np.uint8)
                self._left = self._left[-self._left.ctypes.data % ALIGNMENT :]
            part = self._left[: matrix.nbytes]
            self._left = self._left[-(-matrix.nbytes // ALIGNMENT) * ALIGNMENT :]
        settled = part.view(matrix.dtype).reshape(matrix.shape)
        settled[...] = matrix
        return settled
