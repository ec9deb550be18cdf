# SPDX-License-Identifier: Apache-2.0
"""Radii in one byte each. `PACK.md` defines them, and every reader computes them in the same way.

Code 0 is the radius 0. Code c from 1 to 253 is `MANTISSAS[(c - 1) % 8] * 2^(base + (c - 1) // 8)`. Every array has a
base of its own. Code 255 says that a value is not judged. A radius is rounded up, by 9% at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MANTISSAS = (
    1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096, 1.4142135623730951, 1.5422108254079407,
    1.681792830507429, 1.8340080864093424,
)  # fmt: skip
"""2^(i / 8), correctly rounded."""
LARGEST = 253
"""The code of the largest radius."""
NOT_JUDGED = 255
LOWEST_BASE = -200
"""No base is below it: half of the smallest float32 is 2^-150."""


def table(base: int) -> Any:
    """The radii of the codes from 1 to `LARGEST`, [253], ascending."""
    steps = np.arange(LARGEST)
    return np.ldexp(np.array(MANTISSAS)[steps % 8], base + steps // 8)


def encode(radius: Any) -> tuple[int, Any]:
    """The base and the codes of radii, each rounded up; NaN is not judged.

    radius: [n], not negative   returns: the base, and bytes [n]
    """
    judged = ~np.isnan(radius)
    largest = radius[judged].max(initial=0.0)
    base = max(int(np.frexp(largest)[1]) - 1 - 30, LOWEST_BASE) if largest > 0 else LOWEST_BASE
    codes = np.searchsorted(table(base), np.where(judged, radius, 0.0)) + 1
    codes = np.where(radius == 0, 0, codes)
    return base, np.where(judged, codes, NOT_JUDGED).astype(np.uint8)


def decode(base: int, codes: Any) -> Any:
    """The radii of codes; NaN where a value is not judged.   codes: bytes [n]   returns: [n]"""
    radii = np.concatenate([[0.0], table(base), [np.nan, np.nan]])
    return radii[codes]
