# SPDX-License-Identifier: Apache-2.0
"""A copy of an array beside inaccessible memory, so that an access past its end or before its start is a fault."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
CANARY = 0xCB
VECTOR = 16  # bytes of the widest load
_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory with the array's bytes in it.

    side: ``end``: the array ends where the page ends, on a multiple of its element (a fault at one element past the
    end, but a vector may be misaligned); ``vectors``: as near to that as a multiple of 16 bytes allows; ``start``: the
    array starts where the page starts. Bytes of the page outside the array hold a canary.
    """

    def __init__(self, array: np.ndarray[Any, Any], side: str) -> None:
        self.array = array
        self.body = max(PAGE, -(-array.nbytes // PAGE) * PAGE)
        self._map = mmap.mmap(-1, self.body + 2 * PAGE)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._base = self._bytes.ctypes.data
        step = array.itemsize if side == "end" else VECTOR
        start = 0 if side == "start" else (self.body - array.nbytes) // step * step
        self._start, self._stop = PAGE + start, PAGE + start + array.nbytes
        self._bytes[:] = CANARY
        self._bytes[self._start : self._stop] = array.reshape(-1).view(np.uint8)
        self._protect(0)

    @property
    def address(self) -> int:
        return int(self._base + self._start)

    def offset(self, address: int) -> int | None:
        """The offset of an address from the array's start; None if it is outside this memory."""
        return address - self.address if self._base <= address < self._base + self.body + 2 * PAGE else None

    def finish(self) -> bool:
        """Copy the kernel's results into the array. Returns whether the kernel also wrote outside it."""
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        outside = (self._bytes[PAGE : self._start], self._bytes[self._stop : PAGE + self.body])
        self.array.reshape(-1).view(np.uint8)[:] = self._bytes[self._start : self._stop]
        return any(bool((part != CANARY).any()) for part in outside)

    def _protect(self, mode: int) -> None:
        for page in (self._base, self._base + PAGE + self.body):
            if _libc.mprotect(ctypes.c_void_p(page), PAGE, mode):
                raise OSError(ctypes.get_errno(), "mprotect")
