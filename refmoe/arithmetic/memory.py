# SPDX-License-Identifier: Apache-2.0
"""The memory of arrays: the allocator of the C library, and files that are mapped."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

KEPT = (32 << 20) - (64 << 10)
"""Bytes of the array that is freed to make the allocator keep memory. A larger one, of 32 MiB, would change nothing."""


@cache
def keep_memory() -> None:
    """Make the allocator of the C library keep memory for later arrays.

    glibc gives memory back as soon as 128 KiB are free, and maps blocks of that size anew each time. So much of the
    time of a verdict goes into the page faults of temporary arrays. The largest block that was freed raises both
    limits, for the whole process (mallopt(3), M_MMAP_THRESHOLD): twice its size may then stay free. The memory of this
    block is never touched, so it takes none.
    """
    np.empty(KEPT, np.uint8)


def lasting(values: Any) -> Any:
    """The values, in memory that no file backs, for one who keeps them: a file may change or end."""
    owner = values
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return values if isinstance(owner, np.ndarray | bytes) else np.array(values)
