# SPDX-License-Identifier: Apache-2.0
"""The prompts that a server is asked to continue.

Where rounding can decide the choice of an expert, nothing that follows has a bound. So a prompt is built token by
token: of the tokens that are drawn for a place, the first one is taken at which every router decides by a wide margin.
The same model always gives the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.arithmetic.native.ops import NativeOps
from refmoe.spec.config import Config
from refmoe.spec.model import Caches, Model, Parameters, forward

LENGTHS = (24, 12, 7)
"""The tokens of each prompt. The longest is asked first: some servers fail where the first request is short."""
COUNT = 16
"""The tokens that a server generates after each prompt."""
WIDE = 0.6
"""A margin of the router that no dtype of 16 bits can bridge, in standard deviations of the token's logits."""
DRAWN = 60
"""The tokens that are drawn for a place, at most."""
AHEAD = 3
"""The generated tokens whose margins the last token of a prompt is chosen for."""

Tokens = tuple[int, ...]


class Exact:
    """A model in float64, which remembers how wide the margins of its routers were."""

    def __init__(self, config: Config, parameters: Parameters) -> None:
        self._model = Model(config, parameters)
        self._ops: Any = NativeOps(np.float64, self._tap)
        self._margin = np.inf

    def step(self, token: int, caches: Caches | None) -> tuple[int, float, Caches]:
        """Give the model one more token.   caches: of the tokens before

        returns: the token that it continues with, its smallest margin, and the caches
        """
        self._margin = np.inf
        past = 0 if caches is None else len(caches[0].positions)
        positions, tokens = self._ops.integers([past]), self._ops.integers([token])
        logits, extended = forward(self._ops, self._model, tokens, positions, caches)
        return int(np.argmax(np.asarray(logits[-1]))), self._margin, extended

    def _tap(self, name: str, x: Any) -> None:
        k = self._model.config.experts_per_token
        if name.endswith("router.logits") and k < x.shape[-1]:
            ordered = np.sort(np.asarray(x[-1], np.float64))
            self._margin = min(self._margin, float((ordered[-k] - ordered[-k - 1]) / max(ordered.std(), 1e-300)))

    def continued(self, prompt: Sequence[int], count: int) -> Tokens:
        """The tokens that follow a prompt.   count: their number"""
        caches: Caches | None = None
        made: list[int] = []
        for token in prompt:
            best, _, caches = self.step(token, caches)
        while len(made) < count:
            made.append(best)
            best, _, caches = self.step(best, caches)
        return tuple(made)


def prompts(config: Config, parameters: Parameters, lengths: Sequence[int] = LENGTHS) -> list[Tokens]:
    """A prompt of each length.

    The last token of the vocabulary is in none of them, as a GGUF file needs one that ends a text.
    """
    exact = Exact(config, parameters)
    found = []
    for place, length in enumerate(lengths):
        rng = np.random.default_rng([1, place])
        tokens: list[int] = []
        caches: Caches | None = None
        for left in reversed(range(length)):
            drawn = [int(token) for token in rng.integers(0, max(config.vocab - 1, 1), DRAWN)]
            token, caches = _clear(exact, caches, drawn) if left else _clearest(exact, caches, drawn)
            tokens.append(token)
        found.append(tuple(tokens))
    return found


def _clear(exact: Exact, caches: Caches | None, drawn: Sequence[int]) -> tuple[int, Caches]:
    """The first of some tokens at which every margin is wide, else the one with the widest, and the caches with it."""
    best: tuple[float, int, Caches] | None = None
    for token in drawn:
        _, margin, extended = exact.step(token, caches)
        if best is None or margin > best[0]:
            best = margin, token, extended
        if margin >= WIDE:
            break
    assert best is not None
    return best[1], best[2]


def _clearest(exact: Exact, caches: Caches | None, drawn: Sequence[int]) -> tuple[int, Caches]:
    """The last token of a prompt: the first one after which margins stay wide while the model continues it."""
    best: tuple[float, int, Caches] | None = None
    for token in drawn:
        least, new, extended = np.inf, token, caches
        for _ in range(1 + AHEAD):
            new, margin, extended = exact.step(new, extended)
            least = min(least, margin)
        if best is None or least > best[0]:
            best = least, token, exact.step(token, caches)[2]
        if least >= WIDE:
            break
    assert best is not None
    return best[1], best[2]
