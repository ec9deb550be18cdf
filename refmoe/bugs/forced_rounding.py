"""Rounding that really happens: what a policy merely allows at a cut point, a bug does each time."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import BFLOAT16, FLOAT32, Format, nearest
from refmoe.policy.policy import Policy


def low_precision(policy: Policy) -> Format:
    """The dtype of an engine that computes too coarsely: its storage, or bfloat16 where it stores float32 or better."""
    return BFLOAT16 if policy.storage.holds(FLOAT32) else policy.storage


def rounded(x: Any, format: Format) -> Any:
    """`x` rounded to nearest. An enclosure keeps its proof: what is added is one rounding, and its midpoint moves."""
    if not isinstance(x, Enclosure):
        return nearest(x, format)
    if x.radius is None and not x.owed:
        return Enclosure(nearest(x.mid, format), accumulation=x.accumulation)
    cut = x.cut(format)
    mid = nearest(cut.mid, format)
    moved = np.where(np.isfinite(mid), np.abs(mid - cut.mid), np.inf)
    return Enclosure(mid, cut.r + moved, cut.v + moved**2, x.accumulation)
