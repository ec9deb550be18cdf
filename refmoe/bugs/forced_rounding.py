# SPDX-License-Identifier: Apache-2.0
"""Rounding that a bug does every time. A policy only allows a rounding at a cut point."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import BFLOAT16, FLOAT32, Format, nearest
from refmoe.profiles.policy import Policy


def low_precision(policy: Policy) -> Format:
    """The dtype of an engine that computes too coarsely: the policy's storage, or bfloat16 if that holds float32."""
    return BFLOAT16 if policy.storage.holds(FLOAT32) else policy.storage


def rounded(x: Any, format: Format) -> Any:
    """`x` rounded to nearest. The midpoint of an enclosure is rounded too, and its radius covers one rounding."""
    if not isinstance(x, Enclosure):
        return nearest(x, format)
    if x.radius is None and not x.owed:
        return Enclosure(nearest(x.mid, format), accumulation=x.accumulation)
    cut = x.cut(format)
    mid = nearest(cut.mid, format)
    moved = np.where(np.isfinite(mid), np.abs(mid - cut.mid), np.inf)
    return Enclosure(mid, cut.r + moved, cut.v + moved**2, accumulation=x.accumulation)
