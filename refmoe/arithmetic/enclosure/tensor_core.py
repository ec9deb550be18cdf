# SPDX-License-Identifier: Apache-2.0
"""Matrix products by a tensor core that is described by data, for every order and split of the terms.

The general rule for truncating accumulators (`products.Accumulator`) assumes that a step keeps the bits of float32. An
FP8 product on Ada or Hopper keeps 13. So what is cut off dominates every other error, and it needs an own rule.

radius    In a step, each term and the sum so far lose less than one unit of the last aligned bit. The result loses
          less than one unit of the last kept bit. A unit is relative to the largest term or to the result. Both are at
          most the largest partial sum. Promoted sums are bounded chain by chain: their errors do not grow with n.
variance  What a term loses goes towards zero, and is otherwise spread evenly over a unit. So its second moment is a
          third of the unit's square. The sizes of the partial sums are those along the index, or of a random order.
          Losses that go in the same direction add up: over terms with equal signs, and over the steps of a chain.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import OWN, SLACK, UNDERFLOW, Enclosure, bounded, quiet, unbounded_beyond
from refmoe.arithmetic.enclosure.matrices import between, product_and_path
from refmoe.arithmetic.formats import FLOAT32, Format
from refmoe.arithmetic.tensor_core import TensorCore


@quiet
def product(x: Any, w: Any, core: TensorCore) -> Enclosure:
    """The enclosure of x [l, n] times w [n, m].

    x, w: float64 with values of the core's input format. An infinite or NaN factor gives an infinite radius.
    """
    size, other = np.abs(x), np.abs(w)
    total, energy = size @ other, x**2 @ w**2
    mid, partial = _partial_sums(x, w, energy, core)
    # a subnormal factor counts with the exponent of the smallest normal one, when terms are aligned
    aligned = _aligned(size, core.inputs) @ _aligned(other, core.inputs)
    terms = x.shape[1]
    radius = _radius(mid, total, aligned, core, terms)
    net = np.abs(np.sign(x) @ np.sign(w))
    variance = _variance(mid, energy, partial, net, core, terms)
    return Enclosure(mid, bounded(radius), bounded(variance), accumulation=FLOAT32)


def _radius(mid: Any, total: Any, aligned: Any, core: TensorCore, n: int) -> Any:
    """mid: the sums of terms   total: of their magnitudes   aligned: of their magnitudes as they are aligned

    A part of a split sum has at least one whole step and at most one that is not. So steps count twice.
    """
    chain = core.chain(n)
    steps = 2 * core.steps(chain)
    # a sum that is only ever cut off stays between its negative and its positive terms: losses do not grow
    loss = min((chain + steps) * 2.0**-core.aligned + steps * 2.0**-core.kept, 1.0)
    largest = (total + np.abs(mid)) / 2 + (aligned - total)
    chains = largest if chain == n else aligned  # over chains, the larger parts add up to no more than all terms
    promotions = math.expm1(n * FLOAT32.u)
    radius = loss * chains + promotions * (largest + loss * chains)
    own = (n + 2) * OWN * aligned + 2 * n * FLOAT32.tiny
    radius = (radius + own) * (SLACK + n * OWN)
    return unbounded_beyond(largest + radius, radius, FLOAT32)


def _variance(mid: Any, energy: Any, partial: Any, net: Any, core: TensorCore, n: int) -> Any:
    """partial: the mean square of the partial sums   net: the number of positive terms less that of negative ones"""
    steps, in_chain = core.steps(n), core.steps(core.chain(n))
    term, result = 4.0**-core.aligned, 4.0**-core.kept
    # the squares of the units, summed over steps: a step's largest square is at most the sum of its squares
    units = steps * partial + energy
    independent = ((core.terms + 1) * term + result) / 3 * units
    coherent = in_chain / 4 * (term + result) * units
    drift = term / 4 * units / max(steps, 1) * net**2 + (term + result) / 2 * (in_chain * mid) ** 2
    promotions = FLOAT32.u**2 / 3 * (n / 3 * mid**2 + n / 2 * energy)
    return independent + coherent + drift + promotions + UNDERFLOW


def _partial_sums(x: Any, w: Any, energy: Any, core: TensorCore) -> tuple[Any, Any]:
    """The product, and the mean square of the partial sums in the tensor core.   energy: the squares of the terms"""
    n = x.shape[1]
    chain = core.chain(n)
    if chain == n:
        mid, path = product_and_path(x, w)
        squares = np.maximum(n / 3 * mid**2 + n / 2 * energy, path + between(n) / 2 * energy) if n else 0.0 * mid
        return mid, squares / max(n, 1)
    mid, ends = np.zeros(energy.shape), np.zeros(energy.shape)
    for start in range(0, n, chain):
        end = x[:, start : start + chain] @ w[start : start + chain]
        mid += end
        ends += end**2
    # along the index, chains end no lower than in a random order: their squares add up to at least mid^2 chain / n
    return mid, chain / n * (ends / 3 + energy / 2)


def _aligned(size: Any, format: Format) -> Any:
    return np.where(size == 0, 0.0, np.maximum(size, format.tiny))
