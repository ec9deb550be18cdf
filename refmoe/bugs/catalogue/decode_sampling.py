# SPDX-License-Identifier: Apache-2.0
"""Bugs of sampling, each a `refmoe.bugs.vector_checks.Sampler` with one stage replaced, and a bug of the generation
mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.mutant import PARAMETERS, SAMPLER, mutant
from refmoe.bugs.vector_checks import Sampler
from refmoe.spec.attention import attention as spec_attention
from refmoe.spec.attention import visible as spec_visible
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.text import sampling
from refmoe.text.sampling import Logits


def keep_first(logits: Logits, count: int) -> Logits:
    """The `count` largest logits, with -inf in place of the others. logits: [V]   returns: [V]"""
    return sampling.keep_only(logits, sampling.falling_order(logits)[:count])


def cumulative(logits: Logits) -> Any:
    """The sums of the probabilities in falling order, at most 1. logits: [V]   returns: [V]"""
    weights = sampling.relative_probabilities(logits)[sampling.falling_order(logits)]
    return np.minimum(np.cumsum(weights) / weights.sum(), 1.0)  # a sum rounded above 1 would hide a mistake at p = 1


@mutant(
    "samp-topp-excludes-crossing", breaks=["SAMPLE-6"], touches=["kept"], severity="medium", changes=SAMPLER,
    fix="keep the token that reaches p: compare the sum before it, not with it",
    sources=[
        "https://github.com/Biohub/esm/pull/360",
        "https://github.com/rasbt/reasoning-from-scratch/issues/164",
    ],
)  # fmt: skip
class CrossingExcluded(Sampler):
    """The nucleus ends before the token with which the sum reaches p, so that token is left out."""

    def keep_top_p(self, logits: Logits, p: float) -> Logits:
        return keep_first(logits, int((cumulative(logits) <= p).sum()))


@mutant(
    "samp-topp-one-greedy", breaks=["SAMPLE-6"], touches=["kept"], severity="low", changes=SAMPLER,
    fix="p = 1 keeps all tokens: no sum is above it, and argmax of nothing is 0",
    sources=["https://github.com/BlinkDL/ChatRWKV/pull/170"],
)  # fmt: skip
class FirstCrossing(Sampler):
    """The nucleus ends at the first sum above p, found by argmax. If no sum is above p, as at p = 1, argmax gives 0 and
    only the first token is kept."""

    def keep_top_p(self, logits: Logits, p: float) -> Logits:
        return keep_first(logits, int(np.argmax(cumulative(logits) > p)) + 1)


@mutant(
    "samp-penalty-negative-logit", breaks=["SAMPLE-3"], touches=["penalised"], severity="medium", changes=SAMPLER,
    fix="multiply a negative logit by the penalty",
    sources=[
        "https://github.com/huggingface/transformers/issues/2302",
        "https://github.com/NVIDIA-NeMo/Speech/issues/8194",
    ],
)  # fmt: skip
class DividesAlways(Sampler):
    """The repetition penalty divides negative logits too, which makes a repetition more likely."""

    def penalise(self, logits: Logits, seen: Iterable[int], penalty: float) -> Logits:
        tokens, result = [*set(seen)], logits.copy()
        result[tokens] = logits[tokens] / penalty
        return result


# ---- the mask of a generation: a variation of the forward pass

EOS = 2
"""The id of </s> in both vocabularies of Mixtral."""
HIDDEN = 1 << 40
"""Added to the position of a key that is mistaken for padding. It is larger than any position."""


class TableThatRemembers:
    """The embedding table, which remembers the tokens of the call. The engine makes its mask from them."""

    def __init__(self, table: Any) -> None:
        self.table, self.shape, self.dtype = table, table.shape, table.dtype
        self.asked: Any = None

    def read(self) -> Any:
        return self.table.read()

    def rows(self, ids: Any) -> Any:
        self.asked = np.asarray(ids)
        return self.table.rows(ids)


def attention(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """Attention that marks the keys of EOS as padding in the cache."""
    padding = model.parameters.embedding.asked == EOS

    def extend_cache(ops: Any, cache: Any, k: Any, v: Any, positions: Any) -> Any:
        return CUT_STEPS.extend_cache(ops, cache, k, v, positions + HIDDEN * padding)

    hiding = replace(model, steps=replace(model.steps, extend_cache=extend_cache))
    return spec_attention(ops, hiding, layer, x, positions, cache)


def visible(positions: Any, cached: Any, window: int | None) -> Any:
    """The mask without padding. A query that would see nothing else still sees padding. returns: booleans [T, S]"""
    seen = spec_visible(positions, cached % HIDDEN, window)
    kept = seen & (cached < HIDDEN)
    return kept | (seen & ~kept.any(axis=-1, keepdims=True))


@mutant(
    "gen-pad-eq-eos", breaks=["ATTN-3", "GEN-1"], touches=["attention.probs"], severity="medium",
    changes=PARAMETERS, steps={"attention": attention, "visible": visible},
    fix="take padding from the lengths of the sequences, not from the ids that equal pad",
    sources=["https://github.com/huggingface/transformers/issues/25790"],
)  # fmt: skip
def pad_is_eos(config: Config, parameters: Parameters) -> Parameters:
    """The padding token is EOS, and the mask is made from the ids. A genuine EOS in the context, as after each reply of
    a dialogue, is hidden like padding."""
    table: Any = TableThatRemembers(parameters.embedding)
    return replace(parameters, embedding=table)
