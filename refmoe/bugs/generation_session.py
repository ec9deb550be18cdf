# SPDX-License-Identifier: Apache-2.0
"""Generation with and without router logits. Asking for router logits must change no token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.arithmetic.native.ops import NativeOps
from refmoe.routers.literature.losses import load_balancing_loss
from refmoe.spec.model import Caches, Model, forward
from refmoe.text.generate import generate
from refmoe.text.sampling import SamplingSettings


class Session:
    """One sequence being generated. If router logits are asked for, each call also computes their auxiliary loss."""

    def __init__(self, model: Model, router_logits: bool) -> None:
        self.model, self.router_logits = model, router_logits
        self.ops: Any = NativeOps(np.float64, self._tap)
        self.caches: Caches | None = None
        self.past = 0
        self.losses: list[float] = []
        self._seen: list[Any] = []

    def _tap(self, name: str, x: Any) -> None:
        if name.endswith("router.logits"):
            self._seen.append(x)

    def step(self, tokens: Sequence[int]) -> Any:
        """The logits after the last of these new tokens, [V]."""
        positions = self.ops.integers(range(self.past, self.past + len(tokens)))
        self._seen.clear()
        logits, self.caches = forward(self.ops, self.model, self.ops.integers(tokens), positions, self.caches)
        if self.router_logits:
            k = self.model.config.experts_per_token
            self.losses.append(float(load_balancing_loss(self.ops, self._seen, k, self.counted(tokens))))
        self.past += len(tokens)
        return logits[-1]

    def counted(self, tokens: Sequence[int]) -> Any:
        """The tokens of a call that the loss counts (AUX-5): all of them. returns: booleans [T]"""
        return np.ones(len(tokens), bool)


def unchanged_by_router_logits(session: type[Session], model: Model, prompt: Sequence[int], count: int) -> bool:
    """Whether greedy generation gives the same tokens when router logits are asked for. False if a call fails."""
    found = []
    for router_logits in (False, True):
        step = session(model, router_logits).step
        try:
            found.append([*generate(step, prompt, SamplingSettings(), max_new_tokens=count, stop_ids=(), seed=0)])
        except (IndexError, ValueError):
            return False
    return found[0] == found[1]
