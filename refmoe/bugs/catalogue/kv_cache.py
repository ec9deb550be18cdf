"""Bugs of the cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.bugs.extra_slots import attend_to_more
from refmoe.bugs.mutant import MUTANTS, mutant
from refmoe.spec.attention import Cache
from refmoe.spec.attention import attention as right_attention
from refmoe.spec.attention import visible as right_visible
from refmoe.steps.rounding import attend as right_attend
from refmoe.steps.rounding import cut_again
from refmoe.steps.rounding import extend_cache as right_extend_cache

PAGE = 4
"""Tokens to a page of the cache, 16 and more in real ones: few, so that short sequences cross a page."""

SKIPPED = 1 << 40
"""Added to the position of a key that was never written: beyond any other position."""


# ---- slots


@mutant(
    "cache-write-hole", breaks=["CACHE-1"], touches=["attention.probs"], needs=["DECODE"], step="attend",
    fix="write the first decoded token at the length of the prompt, not one slot further",
    sources=["https://github.com/microsoft/onnxruntime-genai/pull/2354"],
)  # fmt: skip
def hole(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Decoded tokens are written one slot too far: the slot after the prompt stays as it was cleared, and is attended
    to as a key and a value of zeros."""
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
    """When the tokens just fill a page, decoding attends to the next page too, which nobody has written since it was
    recycled: here it holds what an earlier request with the same first tokens left."""
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
    """The step that just fills the window already rolls the cache, and the oldest token is lost a step too early; from
    the next on the window hides it anyway. returns: [T, S]"""
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
    """A ring of two windows takes a whole piece before any of it attends: a piece longer than the window overwrites
    keys and values that its first queries still see, and they read what is now in those slots."""
    window = model.config.window

    def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
        last, slots = mask.shape[1] - 1, np.arange(mask.shape[1])
        newest = slots + (last - slots) // (2 * window) * (2 * window)
        return right_attend(ops, q, Cache(cache.k[newest], cache.v[newest], cache.positions), mask)

    if window is not None and cache is not None and len(positions) > window:
        model = replace(model, steps=replace(model.steps, attend=attend))
    return right_attention(ops, model, layer, x, positions, cache)


# ---- pieces


@mutant(
    "cache-prefill-skips-tokens", breaks=["CACHE-1", "MODEL-4"], touches=["attention.probs"],
    step="extend_cache", fix="advance by the tokens that were processed, not by the size of the piece",
    severity="medium", sources=["https://github.com/Integral2u/SharpMind/issues/57"],
)  # fmt: skip
def last_of_a_piece_is_lost(ops: Any, cache: Any, k: Any, v: Any, positions: Any) -> Cache:
    """A piece that continues a prompt puts one token less into the cache than it has, and the next goes on as if all
    were there: later tokens do not see it."""
    if cache is not None and len(positions) > 1:
        positions = positions + SKIPPED * (np.arange(len(positions)) == len(positions) - 1)
    return right_extend_cache(ops, cache, k, v, positions)


def visible(positions: Any, cached: Any, window: int | None) -> Any:
    """A token that was skipped is seen by its own query only. returns: [T, S]"""
    seen: Any = right_visible(positions, cached % SKIPPED, window)
    return seen & ((cached < SKIPPED) | (positions[:, None] == cached % SKIPPED))


MUTANTS["cache-prefill-skips-tokens"] = replace(
    MUTANTS["cache-prefill-skips-tokens"], steps={"extend_cache": last_of_a_piece_is_lost, "visible": visible}
)


# ---- prefixes


@dataclass(frozen=True)
class Buffer:
    """Keys or values in a buffer that is longer than what is valid: cutting it moves the length, and the rows stay."""

    rows: Any
    """[at least length, K, d]"""
    length: int

    def __getitem__(self, kept: slice) -> Buffer:
        return Buffer(self.rows, min(self.length, int(kept.stop)))

    def extended(self, ops: Any, new: Any) -> Buffer:
        """With the rows of new tokens behind the valid ones, in place of what was there. new: [T, K, d]"""
        end = self.length + new.shape[0]
        parts = [self.rows[: self.length], new, self.rows[end:]]
        return Buffer(ops.concatenate([part for part in parts if part.shape[0]]), end)


@mutant(
    "cache-stale-tail-after-trim", breaks=["CACHE-1", "MODEL-5"], touches=["attention.probs", "attention.context"],
    needs=["SEQMIX"], step="extend_cache", fix="attend to the valid part of the buffer only, after it was cut too",
    sources=[
        "https://github.com/waybarrios/vllm-mlx/issues/380",
        "https://github.com/EricLBuehler/mistral.rs/pull/300",
    ],
)  # fmt: skip
def kept_in_the_buffer(ops: Any, cache: Any, k: Any, v: Any, positions: Any) -> Cache:
    """A request that shares a prefix cuts the cache by its length alone, and attention reads the whole buffer: it sees
    what the earlier request had behind the prefix, as far as that is not overwritten."""
    k = cut_again(ops, "cache.k", "attention.k_rope", k)
    v = cut_again(ops, "cache.v", "attention.v", v)
    if cache is None:
        k, v = Buffer(k, k.shape[0]), Buffer(v, v.shape[0])
        return Cache(k, v, positions)
    return Cache(cache.k.extended(ops, k), cache.v.extended(ops, v), ops.concatenate([cache.positions, positions]))


def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Over the whole buffer. q: [T, H, d]   mask: [T, S]   returns: [T, H, d]"""
    end, k, v = cache.k.length, cache.k.rows, cache.v.rows
    valid = Cache(k[:end], v[:end], cache.positions)
    if k.shape[0] == end:
        return right_attend(ops, q, valid, mask)
    return attend_to_more(ops, q, valid, mask, k[end:], v[end:])


MUTANTS["cache-stale-tail-after-trim"] = replace(
    MUTANTS["cache-stale-tail-after-trim"], steps={"extend_cache": kept_in_the_buffer, "attend": attend}
)
