# SPDX-License-Identifier: Apache-2.0
"""Legal roundings: at other places than in the ideal run, more precise ones, or in sums of another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.arithmetic.formats import nearest
from refmoe.bugs.forced_rounding import rounded
from refmoe.bugs.legal.variant import Engine, legal, with_steps
from refmoe.profiles.cut_points import INNER_CUTS
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.steps.policy_ops import PolicyOps
from refmoe.traces.trace import Run

LANES = 4
"""The partial sums of `sums-in-lanes`, which a vector register keeps. A power of two."""


@legal("gain-before-cast")
def gain_before_cast(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """A norm's gain multiplies in the dtype of statistics, before the row is stored."""

    def rms_norm(ops: Any, x: Any, gain: Any, eps: float) -> Any:
        mean_square = ops.sum(x * x, axis=-1) / x.shape[-1]
        return rounded(x / ops.sqrt(mean_square + eps)[:, None], policy.statistics) * gain

    return Engine(with_steps(config, parameters, rms_norm=rms_norm), runs, policy)


@legal("float32-inside")
def float32_inside(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """Only stored values are rounded to the storage dtype: weights, cache and taps."""
    inner = (cut for cut in INNER_CUTS if cut not in ("weights", "cache.k", "cache.v"))
    cuts = {**policy.cuts, **dict.fromkeys(inner, policy.accumulation)}
    return Engine(with_steps(config, parameters), runs, replace(policy, cuts=cuts))


class SequentialOps(PolicyOps):
    """Sums made one term at a time. Each partial sum is rounded, as in hardware."""

    def __init__(self, policy: Policy, tap: Any, order: Callable[[int], Any], lanes: int = 1) -> None:
        """order: the order of n terms   lanes: the number of partial sums, which are added at the end"""
        super().__init__(policy, tap)
        self.order, self.lanes = order, lanes

    def linear(self, x: Any, weight: Any) -> Any:
        return self.added(x[..., None, :] * self._held(weight.read()), self.policy.accumulation)

    def matmul(self, a: Any, b: Any) -> Any:
        terms = a[..., :, None, :] * np.swapaxes(b, -1, -2)[..., None, :, :]
        return self.added(terms, self.policy.accumulation)

    def sum(self, x: Any, axis: int) -> Any:
        return self.added(np.moveaxis(x, axis, -1), self.policy.statistics)

    def added(self, terms: Any, format: Any) -> Any:
        """The sum of the terms over the last axis. terms: [..., n]   returns: [...]"""
        terms = nearest(terms, format)[..., self.order(terms.shape[-1])]
        totals = [np.zeros(terms.shape[:-1]) for _ in range(self.lanes)]
        for i in range(terms.shape[-1]):
            totals[i % self.lanes] = nearest(totals[i % self.lanes] + terms[..., i], format)
        while len(totals) > 1:
            pairs = zip(totals[0::2], totals[1::2], strict=True)
            totals = [nearest(a + b, format) for a, b in pairs]
        return totals[0]


def summed(id: str, about: str, order: Callable[[int], Any], lanes: int = 1) -> None:
    """Register a legal variant with this order of summation."""

    def function(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
        def ops(used: Policy, tap: Any) -> PolicyOps:
            return SequentialOps(used, tap, order, lanes)

        return Engine(with_steps(config, parameters), runs, policy, ops)

    function.__doc__ = about
    legal(id)(function)


summed(
    "sums-forward",
    "Every sum runs term by term from the first, and each partial sum is rounded.",
    lambda n: np.arange(n),
)
summed("sums-backward", "Every sum runs term by term from the last.", lambda n: np.arange(n)[::-1])
summed("sums-shuffled", "Every sum runs in a random order.", lambda n: np.random.default_rng(n).permutation(n))
summed("sums-in-lanes", "Every sum runs in four lanes, which are added at the end.", lambda n: np.arange(n), LANES)
