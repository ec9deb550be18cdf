# SPDX-License-Identifier: Apache-2.0
"""Whether the errors of a product are those of other weights, rather than noise.

Noise is drawn anew for each token: by a random factor, or by the roundings of a sum. Other weights are the same for all
tokens, so that their errors are a linear function of the input. Let u_t be the input of token t over its norm, and z_t
its errors over the same norm. Two tokens then share

    sum over s < t of (u_s u_t) (z_s z_t)   =   c * sum over s < t of (u_s u_t)^2 * n * mean(z^2)

where n is the number of outputs. c is 0 for noise, and near 1 for fixed errors of weights that are independent of each
other. In noise the terms of the left side have any sign, and add up to a few times the root of the sum of their
squares. The errors are those of weights if the left side is `APART` = 6 times that root, and c is above 1/2, which is
halfway. In a product of experts only pairs of rows of one expert count, since each has its own weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np

from refmoe.profiles.cut_points import PROJECTIONS
from refmoe.spec.taps import step_of
from refmoe.verifier.diagnosis.evidence import Evidence
from refmoe.verifier.passes import Key

APART = 6.0
"""The standard deviations by which errors of weights are beyond noise."""


def of_other_weights(evidence: Evidence, failed: Iterable[Key]) -> bool:
    """Whether the errors of some failed product are those of other weights.   failed: the taps with a failed check"""
    products = [key for key in failed if step_of(key[1]) in PROJECTIONS]
    ordered = sorted(products, key=lambda key: key[1])
    return any(_linear(evidence, list(keys)) for _, keys in groupby(ordered, key=lambda key: key[1]))


def _linear(evidence: Evidence, keys: list[Key]) -> bool:
    """Whether the errors of one product of one layer, in all its failed calls, are linear in its input."""
    pairs = [pair for key in keys if (pair := _rows(evidence, key)) is not None]
    if not pairs:
        return False
    return linear(*(np.concatenate(each) for each in zip(*pairs, strict=True)))


def linear(inputs: Any, errors: Any, matrix: Any) -> bool:
    """Whether errors are a linear function of the inputs, not noise.

    inputs: [T, N]   errors: [T, M]   matrix: the number of the matrix that each row is multiplied by, integers [T]
    """
    size = np.linalg.norm(inputs, axis=1, keepdims=True)
    known = size[:, 0] > 0
    inputs, errors, matrix = inputs[known] / size[known], errors[known] / size[known], matrix[known]
    if not len(inputs):
        return False
    alike = np.triu(inputs @ inputs.T, 1) * (matrix[:, None] == matrix)
    shared = alike * (errors @ errors.T)
    whole, spread = float(shared.sum()), float(np.linalg.norm(shared))
    fixed = float((alike**2).sum() * (errors**2).sum() / len(errors))
    return whole > max(APART * spread, fixed / 2)


def _rows(evidence: Evidence, key: Key) -> tuple[Any, Any, Any] | None:
    """The rows of a product in one call, as `linear` takes them. None if the trace does not have all of them."""
    run, tap = key
    step, trace, observed = step_of(tap), evidence.trace, evidence.observed.get(key)
    prefix = tap.removesuffix(step)
    read, chosen = f"{prefix}{PROJECTIONS[step][1]}", f"{prefix}router.experts"
    of_experts = step.startswith("expert.")
    if observed is None or any(f"{run}/{each}" not in trace.tensors for each in (read, *[chosen] * of_experts)):
        return None
    inputs = np.asarray(trace.get(run, read), np.float64)
    experts = np.asarray(trace.get(run, chosen)) if of_experts else np.zeros(len(inputs), np.int64)
    if of_experts and inputs.ndim == 2:
        inputs = np.broadcast_to(
            inputs[:, None], (*experts.shape, inputs.shape[-1])
        )  # every expert of a token reads it
    rows = experts.size
    if not rows or inputs.size % rows or observed.found.size != math.prod(trace.get(*key).shape):
        return None
    inputs, errors = inputs.reshape(rows, -1), (observed.found - observed.mid).reshape(rows, -1)
    return (inputs, errors, experts.reshape(-1)) if np.isfinite(inputs).all() and np.isfinite(errors).all() else None
