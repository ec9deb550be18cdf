# SPDX-License-Identifier: Apache-2.0
"""Attention over cache slots that hold no token of the sequence. Several bugs of the cache have this effect."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.spec.attention import Cache
from refmoe.steps.rounding import as_softmax_reads, context_of, scores_of


def attend_to_more(ops: Any, q: Any, cache: Cache, mask: Any, k: Any, v: Any) -> Any:
    """`attend` where every query also sees n slots that hold no token of its sequence. The taps leave these slots out.

    q: [T, H, d]   mask: [T, S]   k, v: the contents of the slots, [n, K, d]   returns: [T, H, d]
    """
    cached = mask.shape[1]
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    others = ops.cut("attention.scores", scores_of(ops, q, k))
    seen = np.concatenate([mask, np.ones((mask.shape[0], k.shape[0]), bool)], axis=1)
    probs = ops.softmax(as_softmax_reads(ops, ops.concatenate([scores, others], axis=-1)), seen[None])
    shown = ops.tap("attention.probs", probs[..., :cached])
    probs = ops.concatenate([shown, ops.cut("attention.probs", probs[..., cached:])], axis=-1)
    return ops.tap("attention.context", context_of(ops, probs, ops.concatenate([cache.v, v])))
