# SPDX-License-Identifier: Apache-2.0
"""The errors that a router adds to its formats: of its exp, stated with its source, and of the reference values."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE_UNIT = 2.0**-53
"""The unit of the reference values, which `refmoe.arithmetic.exact.elementary` computes in float64. It counts too."""


@dataclass(frozen=True)
class ExpBudget:
    """A tolerance: the relative error of an engine's exp(x) is at most constant + linear |x| units of rounding."""

    constant: float
    linear: float
    source: str


MEASURED_EXP = ExpBudget(
    8.0, 2.0, "worst relative error on [-88, 0] in units of float32: torch 1.9, NumPy 4.2, exp2(x log2 e) 0.75 |x|"
)
"""Larger than the three measured errors that its source names. An engine with another exp declares its own budget."""
