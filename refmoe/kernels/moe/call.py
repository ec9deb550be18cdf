# SPDX-License-Identifier: Apache-2.0
"""A call of a mixture of experts in mathematics: arrays of float64, whatever the layout and dtype of the kernel are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refmoe.contracts.formats import Floats, Ints


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a call."""

    x: Floats
    """[T, D]"""
    w_gate: Floats
    """[E, F, D]"""
    w_up: Floats
    """[E, F, D]"""
    w_down: Floats
    """[E, D, F]"""
    ids: Ints
    """[T, k]; -1 is an empty slot."""
    weights: Floats
    """[T, k]"""
    expert_map: Ints | None = None
    """[experts of all ranks]: the place of each in the matrices here, or -1."""

    def rows(self, at: Ints) -> Call:
        """The call for some tokens."""
        return replace(self, x=self.x[at], ids=self.ids[at], weights=self.weights[at])

    @property
    def local(self) -> Ints:
        """The ids [T, k] as places in the matrices here; -1 where there is none."""
        if self.expert_map is None:
            return self.ids
        return np.where(self.ids < 0, -1, self.expert_map[self.ids])


def exact_result(call: Call) -> Floats:
    """The result [T, D] of a call whose gates are multiples of 1024 and whose sums are exact.

    silu(g) is then g for positive gates and 0 for others. In float64 exp(-1024) is 0, in narrower formats even more so.
    """
    slots = call.ids.shape[1]
    local, result = call.local.reshape(-1), np.zeros_like(call.x)
    for expert in np.unique(local[local >= 0]):
        at = np.flatnonzero(local == expert)
        rows = call.x[at // slots]
        gate, up = rows @ call.w_gate[expert].T, rows @ call.w_up[expert].T
        share = call.weights.reshape(-1)[at][:, None]
        np.add.at(result, at // slots, share * ((np.maximum(gate, 0) * up) @ call.w_down[expert].T))
    return result
