# SPDX-License-Identifier: Apache-2.0
"""Enclosures of rows that an engine turns by a Hadamard matrix in float32.

In stages, a term takes part in log2(n) additions, one product, and the rounding of the factor. As a matrix product, it
takes part in n / 8 additions in its lane, five of lanes and accumulators, one product, and the rounding of the factor.
So every legal result is within ((1 + u)^depth - 1) S of the exact one, where S is the sum of the magnitudes of terms.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, SLACK, UNDERFLOW, Enclosure, bounded, quiet, unbounded_beyond
from refmoe.arithmetic.enclosure.matrices import between, from_zero_up, product_and_path
from refmoe.arithmetic.formats import FLOAT32, representable
from refmoe.arithmetic.turning import matrix, turn

LANES = 8
"""The fewest lanes in which a kernel adds the terms of a matrix product."""
LOST = 2.0**-149
"""The most that a term loses below the smallest normal float32."""


def depth(n: int, staged: bool) -> int:
    """The most roundings of a term on its way into the sum."""
    return n.bit_length() + 1 if staged else -(-n // LANES) + 7


@quiet
def turned(x: Enclosure, n: int, staged: bool) -> Enclosure:
    """x [..., m] with each block of n values turned.   m: whole blocks   n: a power of two

    staged: whether the engine is known to turn in stages, as `refmoe.arithmetic.turning.turn`; else in any order.
    Known float32 values then have known results, which every rounding decides.
    """
    x = x.settle()
    if x.length is not None:
        return _of_unknown_angle(x, n)
    if staged and x.radius is None and representable(x.mid, FLOAT32).all():
        made = turn(x.mid, n, np.float32)
        if np.isfinite(made).all():
            return Enclosure(made, accumulation=x.accumulation)

    def blocks(part: Any) -> Any:
        return np.broadcast_to(part, x.shape).reshape(-1, n)

    entries = matrix(n)
    sizes, squares = np.abs(entries), entries**2
    rows, radii = blocks(x.mid), blocks(x.r)
    mid, path = product_and_path(rows, entries)
    total, energy = np.abs(rows) @ sizes, rows**2 @ squares
    inherited = from_zero_up(radii, sizes)
    growth, reach = math.expm1(depth(n, staged) * FLOAT32.u), total + inherited
    radius = (inherited + growth * reach + n * LOST + (n + 2) * OWN * total) * (SLACK + n * OWN)
    radius = unbounded_beyond(reach * (1 + growth), radius, FLOAT32)
    spread = np.maximum(n / 3 * mid**2 + n / 2 * energy, path + between(n) / 2 * energy) + energy
    variance = FLOAT32.u**2 / 3 * spread + from_zero_up(blocks(x.v), squares) + (n * LOST) ** 2 + UNDERFLOW
    parts = (mid, bounded(np.where(np.isfinite(mid), radius, np.inf)), bounded(variance))
    return Enclosure(*(part.reshape(x.shape) for part in parts), accumulation=x.accumulation)


def _of_unknown_angle(x: Enclosure, n: int) -> Enclosure:
    """Rows whose pairs an engine may hold turned by an angle that is not known: only their sizes are."""
    most = (x.size + x.r).reshape(-1, n) @ np.abs(matrix(n)) * (SLACK + 2 * n * FLOAT32.u) + n * LOST
    most = most.reshape(x.shape)
    return Enclosure(np.zeros(x.shape), bounded(most), bounded(most**2 / 3 + UNDERFLOW), accumulation=x.accumulation)
