# SPDX-License-Identifier: Apache-2.0
"""Whether the errors of a product are those of other weights, rather than noise.

Noise is drawn anew for each token: by a random factor, or by the roundings of a sum. Other weights are the same for all
tokens, so that their errors are a linear function of the input. Let u_t be the input of token t over its norm, and z_t
its errors over the same norm. Two tokens then share

    sum over s < t of (u_s u_t) (z_s z_t)   =   c * sum over s < t of (u_s u_t)^2 * n * mean(z^2)

where n is the number of outputs. c is 0 for noise, and near 1 for fixed errors of weights that are independent of each
other. If z is noise, the left side has a standard deviation of sqrt(sum (u_s u_t)^2 * n) * mean(z^2). The two cases can
be told apart where the right side is `APART` = 6 of these for c = 1. Then c above 1/2, halfway, refutes noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np

from refmoe.profiles.cut_points import PROJECTIONS
from refmoe.spec.taps import layer_of, step_of
from refmoe.verifier.diagnosis.evidence import Evidence
from refmoe.verifier.passes import Key

APART = 6.0
"""The standard deviations from which noise and fixed errors of weights are told apart."""
READ_BY_ALL = tuple(step for step in PROJECTIONS if not step.startswith("expert."))
"""The products that every token takes part in."""


def of_other_weights(evidence: Evidence, failed: Iterable[Key]) -> bool:
    """Whether the errors of some failed product are those of other weights.   failed: the taps with a failed check"""
    products = [key for key in failed if step_of(key[1]) in READ_BY_ALL]
    ordered = sorted(products, key=lambda key: key[1])
    return any(_linear(evidence, list(keys)) for _, keys in groupby(ordered, key=lambda key: key[1]))


def _linear(evidence: Evidence, keys: list[Key]) -> bool:
    """Whether the errors of one product of one layer, in all its failed calls, are linear in its input."""
    pairs = [pair for key in keys if (pair := _rows(evidence, key)) is not None]
    if not pairs:
        return False
    return linear(*(np.concatenate(each) for each in zip(*pairs, strict=True)))


def linear(inputs: Any, errors: Any) -> bool:
    """Whether errors of tokens are a linear function of their inputs, not noise.   inputs: [T, N]   errors: [T, M]"""
    size = np.linalg.norm(inputs, axis=1, keepdims=True)
    known = size[:, 0] > 0
    inputs, errors = inputs[known] / size[known], errors[known] / size[known]
    if not len(inputs):
        return False
    alike = np.triu(inputs @ inputs.T, 1)
    shared = float((alike * (errors @ errors.T)).sum())
    reach, square = float((alike**2).sum()) * errors.shape[1], float((errors**2).mean())
    return bool(math.sqrt(reach) > APART and shared > reach * square / 2)


def _rows(evidence: Evidence, key: Key) -> tuple[Any, Any] | None:
    """The inputs [T, N] and the errors [T, M] of a product in one call. None if the trace does not have both whole."""
    run, tap = key
    layer, trace, observed = layer_of(tap), evidence.trace, evidence.observed.get(key)
    read = PROJECTIONS[step_of(tap)][1]
    name = read if layer is None else f"layers.{layer}.{read}"
    if observed is None or f"{run}/{name}" not in trace.tensors:
        return None
    inputs = np.asarray(trace.get(run, name), np.float64)
    inputs = inputs.reshape(len(inputs), -1)
    if not len(inputs) or observed.found.size % len(inputs) or observed.found.size != math.prod(trace.get(*key).shape):
        return None
    errors = (observed.found - observed.mid).reshape(len(inputs), -1)
    return (inputs, errors) if np.isfinite(inputs).all() and np.isfinite(errors).all() else None
