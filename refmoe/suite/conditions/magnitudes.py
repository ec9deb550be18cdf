# SPDX-License-Identifier: Apache-2.0
"""Conditions of the magnitudes of values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refmoe.suite.conditions.observed import FLOAT32_EXP_ZERO, Observed, condition

FLOAT16_LARGEST = 65504.0


@condition("magnitude", "TINYMAG", "a norm reads a row, not zero, with a mean square under 10 eps", "TINYMAG")
def _tiny(seen: Observed) -> bool:
    squares = np.concatenate([np.mean(x * x, axis=-1) for x in seen.normed()])
    return bool(((squares > 0) & (squares < 10 * seen.config.norm_eps)).any())


@condition("magnitude", "ZERO-ROW", "a norm reads a row of zeros")
def _zero_row(seen: Observed) -> bool:
    return any((x == 0).all(axis=-1).any() for x in seen.normed())


@condition("magnitude", "NONZERO-MEAN", "a norm reads a row whose squared mean is over a tenth of its mean square")
def _nonzero_mean(seen: Observed) -> bool:
    return any((x.mean(axis=-1) ** 2 > 0.1 * (x * x).mean(axis=-1)).any() for x in seen.normed())


@condition("magnitude", "BIGMAG", "gate x up passes 65504, the largest float16, and fits float32", "BIGMAG")
def _big(seen: Observed) -> bool:
    return any(FLOAT16_LARGEST < np.abs(hidden).max() < 1e38 for _, hidden in seen.layers("expert.hidden"))


@condition("magnitude", "BIGSQUARE", "a norm reads an element over 256, whose square passes float16", "BIGMAG")
def _big_square(seen: Observed) -> bool:
    return any(np.abs(x).max() > 256 for x in seen.normed())


@condition("magnitude", "GATESPAN", "gates under -4 and over 4, where silu and gelu are far apart", "BIGMAG")
def _gate_span(seen: Observed) -> bool:
    gates = [gate for _, gate in seen.layers("expert.gate")]
    return any((gate < -4).any() for gate in gates) and any((gate > 4).any() for gate in gates)


@condition("magnitude", "LOWPREC", "outputs of the experts that bfloat16 has to round", "LOWPREC")
def _rounds(seen: Observed) -> bool:
    return any(not _fits(y, ml_dtypes.bfloat16) for _, y in seen.layers("moe.output"))


@condition("magnitude", "DYADIC", "every value of every tap is exact in bfloat16 and in float16")
def _dyadic(seen: Observed) -> bool:
    return all(_fits(x, ml_dtypes.bfloat16) and _fits(x, np.float16) for x in seen.arrays.values())


def _fits(x: NDArray[Any], dtype: Any) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(x.astype(dtype).astype(x.dtype), x)


@condition("magnitude", "SCORE-UNDERFLOW", "a visible score whose exp underflows to zero in float32", "BIGMAG")
def _score_underflow(seen: Observed) -> bool:
    for run, scores in seen.layers("attention.scores"):
        distance = np.array(run.positions)[:, None] - np.arange(run.positions[0] - run.past, run.positions[-1] + 1)
        hidden = (distance < 0) | (distance >= (seen.config.window or np.inf))
        largest = np.where(hidden, -np.inf, scores).max(axis=-1)
        if (largest - np.where(hidden, np.inf, scores).min(axis=-1)).max() > FLOAT32_EXP_ZERO:
            return True
    return False
