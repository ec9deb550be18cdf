# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: sizes of calls within a declaration, around blocks and at the ends of what is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from hypothesis import strategies as st

from refmoe.contracts.drawing import BLOCK_COUNTS
from refmoe.contracts.law import Strategy
from refmoe.kernels.moe.data import Load, Sizes
from refmoe.kernels.moe.declaration import Declaration

LOADS: tuple[Load, ...] = get_args(Load)
AROUND_TILES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
"""Widths at and around the tiles of kernels, and numbers that are multiples of nothing."""
EXPERT_COUNTS = (1, 2, 3, 8, 16, 60, 64, 65, 128, 129, 255, 256)
SEEDS = st.integers(0, 1 << 20)


def built(
    d: Declaration, tokens: Strategy, experts: Strategy, slots: Strategy, widths: Strategy, repeated: bool = False
) -> Strategy:
    """Sizes from these strategies, brought within the declaration.   repeated: an expert may fill several slots"""
    loads = [load for load in LOADS if (repeated and d.repeats) or load != "repeated"]

    def make(t: int, e: int, k: int, hidden: int, inner: int, seed: int, load: Load) -> Sizes:
        experts = min(e, d.most_experts)
        return Sizes(
            tokens=min(max(t, d.least_tokens), d.most_tokens),
            experts=experts,
            top_k=1 if d.routing == "offsets" else max(1, min(k, experts, d.most_slots)),
            hidden=-(-hidden // d.multiple) * d.multiple,
            inner=-(-inner // d.multiple) * d.multiple,
            seed=seed,
            load=load,
        )

    return st.builds(make, tokens, experts, slots, widths, widths, SEEDS, st.sampled_from(loads))


def small(d: Declaration, least: int = 1, most: int = 9, width: int = 1, repeated: bool = False) -> Strategy:
    """A few tokens, a few experts, and widths from `width` to 40.   repeated: as for `built`"""
    experts, slots = st.integers(1, 8), st.integers(1, 4)
    return built(d, st.integers(least, most), experts, slots, st.integers(width, 40), repeated)


def around_blocks(d: Declaration) -> Strategy:
    """Counts of tokens at and around blocks, 0 and 1 among them."""
    block = () if d.block is None else (d.block - 1, d.block, d.block + 1, 2 * d.block + 1)
    counts = st.sampled_from((0, 1, 2, *BLOCK_COUNTS, *block))
    return built(d, counts, st.sampled_from((1, 2, 8)), st.integers(1, 2), st.integers(1, 9))


def loads(d: Declaration) -> Strategy:
    """Up to 256 experts, k from 1 to E, and few tokens, so that most experts have none."""
    slots = st.one_of(st.sampled_from((1, 2, 8)), st.just(256))
    return built(d, st.integers(1, 40), st.sampled_from(EXPERT_COUNTS), slots, st.integers(1, 6), repeated=True)


def widths(d: Declaration) -> Strategy:
    """Hidden sizes at and around tiles."""
    return built(d, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from(AROUND_TILES))


def only(strategy: Strategy, **more: Strategy) -> Strategy:
    """Examples with sizes from a strategy and more arguments."""
    return st.fixed_dictionaries({"sizes": strategy, **more})


def counts(numbers: Sequence[int]) -> Strategy:
    return st.sampled_from(list(numbers))
