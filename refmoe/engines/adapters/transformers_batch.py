# SPDX-License-Identifier: Apache-2.0
"""Each sequence as the left-padded row of a batch of two, as `generate` runs prompts of several lengths.

The second row is longer by the padding, and holds other tokens. The first row is recorded without its padding, as a
sequence by itself would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.engines.adapter import Skipped
from refmoe.engines.capture import transformers as engine
from refmoe.errors import require
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

PADDING = 3
"""The padding tokens before the first row."""


@dataclass
class _Row:
    """A sequence that has begun: the cache of its batch, and the attention mask so far, int64 [2, S]."""

    cache: Any
    mask: Any


class PaddedBatch:
    """A model whose runs are rows of a batch."""

    def __init__(self, model: Any, recorder: Recorder) -> None:
        """recorder: gets the values of the first row, by tap"""
        self.model, self.recorder = model, recorder
        self.width = engine.head_dim(model)
        self.rows: dict[int, _Row] = {}

    def run(self, runs: Sequence[Run]) -> None:
        """Record all runs. Raises Skipped for a run that a batch of `generate` does not have."""
        torch: Any = require("torch", "engines", "the adapter of transformers")
        with torch.no_grad():
            for run in runs:
                self._one(run, torch)

    def _one(self, run: Run, torch: Any) -> None:
        row = self.rows.setdefault(run.sequence, _Row(engine.growing_cache(), torch.zeros((2, 0), dtype=torch.int64)))
        seen = max(row.mask.shape[1] - PADDING, 0)
        if run.past != seen or run.positions != tuple(range(seen, seen + len(run.tokens))):
            raise Skipped(f"{run.run} cuts the cache or has other positions, which the mask of a batch does not say")
        padding = 0 if row.mask.shape[1] else PADDING
        vocabulary, other = self.model.config.vocab_size, [*run.tokens, *[1] * padding]
        ids = torch.tensor([[0] * padding + [*run.tokens], [(7 * token + 3) % vocabulary for token in other]])
        new = torch.ones_like(ids)
        new[0, :padding] = 0
        row.mask = torch.cat([row.mask, new], dim=1)
        positions = (row.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self.recorder.begin(run)

        def record(tap: str, array: NDArray[Any]) -> None:
            self.recorder(tap, engine.shaped(tap, first_row(tap, array, padding), self.width))

        with engine.hooks(self.model, record):
            self.model(
                input_ids=ids, attention_mask=row.mask, position_ids=positions, past_key_values=row.cache,
                use_cache=True,
            )  # fmt: skip


def first_row(tap: str, array: NDArray[Any], padding: int) -> NDArray[Any]:
    """The first row of a batch of two, without its padding.   padding: of this call

    array: [2, T, ...], [2, H, T, S] of probabilities, or of router and experts [2 T, ...]
    returns: [1, T, ...], [1, H, T, S], [T, ...]; S without the padding of the first call
    """
    step = step_of(tap)
    if step == "attention.probs":
        return array[:1, :, padding:, PADDING:]
    if step.startswith(("router.", "expert.")):
        return np.ascontiguousarray(array.reshape(2, -1, *array.shape[1:])[0, padding:])
    return array[:1, padding:]
