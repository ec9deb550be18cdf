# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation."""

from __future__ import annotations

from refmoe.spec.interface import Array, Ops


def rms_norm(ops: Ops, x: Array, gain: Array, eps: float) -> Array:
    """Scale each row of `x` to unit root mean square, then each column by `gain`.

    NORM-1  y = x / sqrt(mean(x^2) + eps) * gain, the mean taken over the last axis; no mean is subtracted.
    NORM-2  eps is added to the mean square, inside the root.
    NORM-3  gain multiplies as it is stored (no 1 + gain), after the division.

    x: [T, D]   gain: [D]   returns: [T, D]
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
    """
    mean_square = ops.sum(x * x, axis=-1) / x.shape[-1]
    return x / ops.sqrt(mean_square + eps)[:, None] * gain
