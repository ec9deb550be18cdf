"""The steps in which the spec loops over heads or experts, with fewer and larger products.

Exact arithmetic gives the bits of the spec; a native one may differ from it in the last ones. Held to the spec by
`tests/steps/test_grouped.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refmoe.spec.experts import Expert, run_expert
from refmoe.spec.interface import Array
from refmoe.spec.model import Steps
from refmoe.spec.softmax import softmax

GroupingOps = Any
"""An `ArrayOps`: the ops of the spec, with `group` and `inverse`."""


def attend(ops: GroupingOps, q: Any, cache: Any, mask: Any) -> Any:
    """`refmoe.spec.attention.attend`, with one product for all query heads that share a key/value head.

    q: [T, H, d]   cache: S tokens   mask: [T, S]   returns: [T, H, d]
    """
    tokens, heads, head_dim = q.shape
    rows = grouped_by_kv_head(q, cache.k.shape[1])
    dots = ops.matmul(rows, cache.k.transpose(1, 2, 0)).reshape(heads, tokens, -1)
    scores = ops.tap("attention.scores", dots / ops.sqrt(ops.array(head_dim)))
    probs = ops.tap("attention.probs", softmax(ops, scores, mask[None]))
    mixed = ops.matmul(probs.reshape(len(rows), -1, probs.shape[-1]), cache.v.transpose(1, 0, 2))
    return ops.tap("attention.context", mixed.reshape(heads, tokens, head_dim).transpose(1, 0, 2))


def grouped_by_kv_head(q: Any, kv_heads: int) -> Any:
    """The rows that are multiplied with each key/value head: its query heads one after another.

    q: [T, H, d]   returns: [K, H / K * T, d]
    """
    tokens, heads, head_dim = q.shape
    by_head = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim).transpose(1, 2, 0, 3)
    return by_head.reshape(kv_heads, -1, head_dim)


def run_experts(ops: GroupingOps, experts: Sequence[Expert], x: Any, chosen: Any) -> Array:
    """`refmoe.spec.experts.run_experts`, with the rows sorted by expert once.

    x: [T, D]   chosen: integers [T, k]   returns: [T, k, D], in the order of `chosen`
    """
    k = chosen.shape[1]
    order, counts = ops.group(chosen.reshape(-1), len(experts))
    rows = x[order // k]
    results, start = [], 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            results.append(run_expert(ops, expert, rows[start : start + count]))
            start += count
    slot = ops.inverse(order)
    output: Any = None
    for name, parts in zip(("gate", "up", "hidden", "output"), zip(*results, strict=True), strict=True):
        output = ops.tap(f"expert.{name}", ops.concatenate(parts)[slot].reshape(*chosen.shape, -1))
    found: Array = output
    return found


GROUPED_STEPS = Steps(attend=attend, run_experts=run_experts)
"""The steps of the spec, the two with loops replaced."""
