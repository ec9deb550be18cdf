# SPDX-License-Identifier: Apache-2.0
"""Matrices of middle size in memory that the system may map in huge pages.

Multiplying one token with a weight takes as long as reading the weight, and pages of 4 KiB slow reading by a fifth.
NumPy asks for huge pages for arrays of at least 4 MiB. A smaller array gets them as a part of such an array.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np

HUGE_BY_ITSELF = 4 << 20
IN_CACHE_ANYWAY = 1 << 18
"""Bytes below which an array is not moved, because a core's cache keeps it from one use to the next."""
SLAB = 32 << 20
ALIGNMENT = 64


class Slabs:
    """Large arrays, one after another. Each matrix gets the next part of the current array.

    An array is freed when no part of it is used any more.
    """

    def __init__(self) -> None:
        self._left = np.empty(0, np.uint8)
        self._lock = Lock()  # experts ask for their weights in parallel

    def settle(self, matrix: Any) -> Any:
        """The matrix, copied into a slab if it is of middle size."""
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
