# SPDX-License-Identifier: Apache-2.0
"""Bugs of the cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.bugs.extra_cache_slots import attend_to_more
from refmoe.bugs.mutant import mutant
from refmoe.spec.attention import Cache
from refmoe.spec.attention import attention as right_attention
from refmoe.spec.attention import visible as right_visible
from refmoe.steps.rounding import attend as right_attend
from refmoe.steps.rounding import extend_cache as right_extend_cache
from refmoe.steps.rounding import kept_keys, kept_values

PAGE = 4
"""Tokens in a page of the cache. Real pages have 16 and more; with 4, short sequences cross a page."""

SKIPPED = 1 << 40
"""Added to the position of a key that was never written. It is larger than any position."""


# ---- slots


@mutant(
    "cache-write-hole", breaks=["CACHE-1"], touches=["attention.probs"], needs=["DECODE"], step="attend",
    fix="write the first decoded token at the length of the prompt, not one slot further",
    sources=["https://github.com/microsoft/onnxruntime-genai/pull/2354"],
)  # fmt: skip
def hole(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Decoded tokens are written one slot too far. The slot after the prompt stays cleared, and is attended to as a key
    and a value of zeros."""
    if q.shape[0] > 1 or mask.shape[1] == 1:
        return right_attend(ops, q, cache, mask)
    return attend_to_more(ops, q, cache, mask, cache.k[:1] * 0.0, cache.v[:1] * 0.0)


@mutant(
    "cache-length-rounded-up", breaks=["CACHE-1"], touches=["attention.probs", "attention.context"], needs=["DECODE"],
    step="attend", fix="attend to as many tokens as there are, where they just fill a page too",
    sources=[
        "https://github.com/pegainfer-project/pegainfer/pull/350",
        "https://github.com/tenstorrent/tt-metal/issues/54413",
    ],
)  # fmt: skip
def page_too_many(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """When the tokens exactly fill a page, decoding also attends to the next page, which was recycled and never
    written. Here that page holds the tokens of an earlier request with the same beginning."""
    if q.shape[0] > 1 or mask.shape[1] % PAGE:
        return right_attend(ops, q, cache, mask)
    return attend_to_more(ops, q, cache, mask, cache.k[:PAGE], cache.v[:PAGE])


# ---- window


@mutant(
    "cache-window-update-at-boundary", breaks=["CACHE-3", "ATTN-4"], touches=["attention.probs"],
    needs=["DECODE-ACROSS-W"], step="visible", fix="roll the cache when a token no longer fits, not when it just does",
    severity="medium", sources=["https://github.com/huggingface/transformers/issues/37574"],
)  # fmt: skip
def rolled_early(positions: Any, cached: Any, window: int | None) -> Any:
    """The step that exactly fills the window already rolls the cache, so the oldest token is lost one step too early.
    Later the window hides that token anyway. returns: [T, S]"""
    seen: Any = right_visible(positions, cached, window)
    if len(positions) == 1 < len(cached) == window:
        seen[:, 0] = False
    return seen


@mutant(
    "cache-chunk-larger-than-window", breaks=["CACHE-1", "CACHE-3", "MODEL-4"], needs=["SWA"], severity="medium",
    touches=["attention.scores", "attention.context"], step="attention",
    fix="attend before the ring takes the piece, or take pieces no longer than the window",
    sources=["https://github.com/pytorch/executorch/pull/20346"],
)  # fmt: skip
def ring_written_first(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """A ring of two windows takes a whole piece of the prompt before any of its queries attend. A piece longer than the
    window overwrites keys and values that its first queries still need."""
    window = model.config.window

    def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
        last, slots = mask.shape[1] - 1, np.arange(mask.shape[1])
        newest = slots + (last - slots) // (2 * window) * (2 * window)
        return right_attend(ops, q, Cache(cache.k[newest], cache.v[newest], cache.positions), mask)

    if window is not None and cache is not None and len(positions) > window:
        model = replace(model, steps=replace(model.steps, attend=attend))
    return right_attention(ops, model, layer, x, positions, cache)


# ---- pieces


def visible(positions: Any, cached: Any, window: int | None) -> Any:
    """The right mask, but only its own query sees a token that was skipped. returns: [T, S]"""
    seen: Any = right_visible(positions, cached % SKIPPED, window)
    return seen & ((cached < SKIPPED) | (positions[:, None] == cached % SKIPPED))


@mutant(
    "cache-prefill-skips-tokens", breaks=["CACHE-1", "MODEL-4"], touches=["attention.probs"],
    step="extend_cache", steps={"visible": visible},
    fix="advance by the tokens that were processed, not by the size of the piece",
    severity="medium", sources=["https://github.com/Integral2u/SharpMind/issues/57"],
)  # fmt: skip
def last_of_a_piece_is_lost(ops: Any, cache: Any, k: Any, v: Any, positions: Any) -> Cache:
    """A piece that continues a prompt writes one token too few into the cache, and the next piece goes on as if all
    were there. Later tokens do not see the lost token."""
    if cache is not None and len(positions) > 1:
        positions = positions + SKIPPED * (np.arange(len(positions)) == len(positions) - 1)
    return right_extend_cache(ops, cache, k, v, positions)


# ---- prefixes


@dataclass(frozen=True)
class Buffer:
    """Keys or values in a buffer that is longer than its valid part. Cutting it changes the length and leaves the
    rows."""

    rows: Any
    """[at least length, K, d]"""
    length: int

    def __getitem__(self, kept: slice) -> Buffer:
        return Buffer(self.rows, min(self.length, int(kept.stop)))

    def extended(self, ops: Any, new: Any) -> Buffer:
        """The buffer with new rows after the valid ones, over old rows. new: [T, K, d]"""
        end = self.length + new.shape[0]
        parts = [self.rows[: self.length], new, self.rows[end:]]
        return Buffer(ops.concatenate([part for part in parts if part.shape[0]]), end)


def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Attention over the whole buffer. q: [T, H, d]   mask: [T, S]   returns: [T, H, d]"""
    end, k, v = cache.k.length, cache.k.rows, cache.v.rows
    valid = Cache(k[:end], v[:end], cache.positions)
    if k.shape[0] == end:
        return right_attend(ops, q, valid, mask)
    return attend_to_more(ops, q, valid, mask, k[end:], v[end:])


@mutant(
    "cache-stale-tail-after-trim", breaks=["CACHE-1", "MODEL-5"], touches=["attention.probs", "attention.context"],
    needs=["SEQMIX"], step="extend_cache", steps={"attend": attend},
    fix="attend to the valid part of the buffer only, after it was cut too",
    sources=[
        "https://github.com/waybarrios/vllm-mlx/issues/380",
        "https://github.com/EricLBuehler/mistral.rs/pull/300",
    ],
)  # fmt: skip
def kept_in_the_buffer(ops: Any, cache: Any, k: Any, v: Any, positions: Any) -> Cache:
    """A request that shares a prefix cuts only the length of the cache, and attention reads the whole buffer. It sees
    the tokens of the earlier request after the prefix that are not yet overwritten."""
    k = kept_keys(ops, k)
    v = kept_values(ops, v)
    if cache is None:
        k, v = Buffer(k, k.shape[0]), Buffer(v, v.shape[0])
        return Cache(k, v, positions)
    return Cache(cache.k.extended(ops, k), cache.v.extended(ops, v), ops.concatenate([cache.positions, positions]))


# ---- met since: rings, rejected tokens, scales


@mutant(
    "cache-ring-written-before-chunk", breaks=["CACHE-1", "CACHE-3", "ATTN-3"], needs=["SWA"], severity="critical",
    touches=["attention.scores", "attention.context"], step="attention",
    fix="attend before the ring takes the piece, and build the mask from the positions in the ring",
    sources=[
        "https://github.com/Lightning-AI/litgpt/issues/2182",
        "https://github.com/Lightning-AI/litgpt/pull/2215",
    ],
)  # fmt: skip
def ring_of_a_window(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """A ring of one window takes a whole piece of the prompt before its queries attend, and the mask still counts
    slots. The first queries read later tokens where older ones stood."""
    window = model.config.window

    def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
        last, slots = mask.shape[1] - 1, np.arange(mask.shape[1])
        newest = slots + (last - slots) // window * window
        return right_attend(ops, q, Cache(cache.k[newest], cache.v[newest], cache.positions), mask)

    if window is not None and len(positions) > 1:
        model = replace(model, steps=replace(model.steps, attend=attend))
    return right_attention(ops, model, layer, x, positions, cache)


@dataclass(frozen=True)
class Kept:
    """Values of which a cut takes only the length. New values do not replace the rows that are there."""

    rows: Any
    """[at least length, K, d]"""
    length: int

    def __getitem__(self, kept: slice) -> Kept:
        return Kept(self.rows, min(self.length, int(kept.stop)))

    def extended(self, ops: Any, new: Any) -> Kept:
        """With the new values in rows that were never written. new: [T, K, d]"""
        end, held = self.length + new.shape[0], self.rows.shape[0]
        fresh = new[held - self.length :] if end > held else new[:0]
        return Kept(ops.concatenate([self.rows, fresh]) if fresh.shape[0] else self.rows, end)


def attend_kept(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Attention over the rows that the cache counts. q: [T, H, d]   mask: [T, S]   returns: [T, H, d]"""
    return right_attend(ops, q, Cache(cache.k, cache.v.rows[: cache.v.length], cache.positions), mask)


@mutant(
    "cache-rejected-values-stay", breaks=["CACHE-1", "MODEL-5"], touches=["attention.context"], needs=["SEQMIX"],
    step="extend_cache", steps={"attend": attend_kept}, severity="critical",
    fix="after rejected tokens write values from the same row as keys",
    sources=[
        "https://github.com/ml-explore/mlx-lm/issues/1423",
        "https://github.com/ohdearquant/lattice/issues/243",
    ],
)  # fmt: skip
def values_of_rejected(ops: Any, cache: Any, k: Any, v: Any, positions: Any) -> Cache:
    """Tokens that were rejected, or belong to another request, are cut from the keys only. Their values stay, and the
    new tokens' values are not written over them."""
    k = kept_keys(ops, k)
    v = kept_values(ops, v)
    if cache is None:
        v = Kept(v, v.shape[0])
        return Cache(k, v, positions)
    keys = ops.concatenate([cache.k, k])
    return Cache(keys, cache.v.extended(ops, v), ops.concatenate([cache.positions, positions]))


VALUE_SCALE = 0.5
"""The scale of the cached values, as a checkpoint for a cache in fp8 has it. A power of two, so that it is exact."""


@mutant(
    "cache-value-scale-not-applied", breaks=["ATTN-5", "CACHE-1"], touches=["attention.context"], step="attend",
    fix="multiply by v_scale where the cached values are read", severity="medium",
    sources=[
        "https://github.com/lightseekorg/tokenspeed/pull/759",
        "https://github.com/sgl-project/sglang/pull/20705",
    ],
)  # fmt: skip
def values_as_stored(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Values are divided by their scale on the way into the cache. The kernel that reads them does not multiply by it
    again."""
    return right_attend(ops, q, Cache(cache.k, cache.v * (1 / VALUE_SCALE), cache.positions), mask)
