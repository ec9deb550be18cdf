# SPDX-License-Identifier: Apache-2.0
"""The blocks of tokens that a run is verified in: their size, and the index in a tap of an element of a block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.spec.config import Config
from refmoe.spec.taps import LAYER_TAPS
from refmoe.traces.trace import Run
from refmoe.verifier.subject import DIMENSIONS, sizes_of
from refmoe.verifier.tally import Place

BLOCK_BYTES = 16 << 20
"""The most bytes, in binary64, of the largest tap of a block. A pass holds about twenty arrays of that size."""


def places(shape: tuple[int, ...], origin: tuple[int, ...], flat: Any = None) -> Place:
    """The function from a position in a block to an index in the tap. The block begins at `origin`.

    flat: the elements of the block that the positions count; None: all elements.
    """

    def place(at: int) -> tuple[int, ...]:
        index = np.unravel_index(at if flat is None else int(flat[at]), shape)
        first = (*origin, *[0] * (len(index) - len(origin)))
        return tuple(int(i) + start for i, start in zip(index, first, strict=True))

    return place


def by_entry(place: Place, ids: Any, start: int) -> Place:
    """The places in a list of entries as places in the vocabulary.   ids: integers [T, n] of the tokens from `start`"""

    def entry(at: int) -> tuple[int, ...]:
        token, slot = place(at)
        return token, int(ids[token - start, slot])

    return entry


def without_bound(x: Enclosure, tokens: Any) -> Enclosure:
    """The enclosure with an infinite radius and variance in the rows of `tokens`."""
    radius = np.array(np.broadcast_to(x.r, x.shape), np.float64)
    variance = np.array(np.broadcast_to(x.v, x.shape), np.float64)
    radius[tokens] = np.inf
    variance[tokens] = np.inf
    return Enclosure(x.mid, radius, variance, accumulation=x.accumulation, owed=x.owed)


def block_size(config: Config, run: Run, attending: bool = True) -> int:
    """The number of tokens that are verified together, so that memory does not grow with the run.

    attending: whether any layer attends. Of a run without taps, a model of one layer computes keys and values alone.
    """
    sizes = sizes_of(config, run)
    steps = [step for step in ("logits", *LAYER_TAPS) if attending or "S" not in DIMENSIONS[step]]
    per_token = max(math.prod(sizes[axis] for axis in DIMENSIONS[step]) for step in steps) / len(run.tokens)
    return max(1, min(len(run.tokens), int(BLOCK_BYTES / (8 * per_token))))
