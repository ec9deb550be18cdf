# SPDX-License-Identifier: Apache-2.0
"""Arrays of engines in the shapes of the taps: rotary pairs in half-split order, rows of experts in their slots."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADED = ("attention.q", "attention.k", "attention.v", "attention.context")
"""Taps [T, heads, d] that most engines hold with the heads joined: [T, heads d]."""


def half_split(array: NDArray[Any]) -> NDArray[Any]:
    """Heads with interleaved rotary pairs in half-split order, as ROPE-3 wants them.   array: [T, heads, d]"""
    return array.reshape(*array.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(array.shape)


def put_rows(slots: dict[str, NDArray[Any]], step: str, rows: NDArray[Any], chosen: NDArray[Any], expert: int) -> None:
    """Put the rows of one expert, in the order of its tokens, into the slots that have chosen it.

    slots: per step [T, k, n]; a step that is missing is added.   rows: [tokens of the expert, n]   chosen: [T, k]
    """
    if step not in slots:
        slots[step] = np.zeros((*chosen.shape, rows.shape[-1]), rows.dtype)
    slots[step][np.nonzero(chosen == expert)] = rows
