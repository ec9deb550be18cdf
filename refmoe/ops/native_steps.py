"""Steps of the model for `NativeOps` that write where they read: the spec's functions with fewer arrays in between.

Only where nobody watches: a tap needs the arrays that are saved here, and the spec's step makes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.spec import attention as spec_attention
from refmoe.spec import experts as spec_experts
from refmoe.spec.attention import Cache
from refmoe.spec.experts import Expert
from refmoe.spec.model import Steps

Array = Any
Native = Any
"""A `NativeOps`. (Its weights can be read; those of the spec's own `Ops` have a shape and nothing else.)"""

BLOCK = 1 << 14
"""Elements that are computed at a time: few enough to stay in a core's cache from one operation to the next."""
OVERFLOW = 0.9
"""A gate below minus so much of the largest logarithm is left to the spec's form, whose exp cannot overflow."""


def swiglu(ops: Native, gate: Array, up: Array) -> Array:
    """`refmoe.spec.experts.swiglu`: gate / (1 + exp(-gate)) * up, written over `up`.

    gate, up: [n, F], dense   returns: [n, F]
    """
    if gate.min() < -OVERFLOW * np.log(np.finfo(gate.dtype).max):
        return spec_experts.swiglu(ops, gate, up)
    g, u = gate.reshape(-1), up.reshape(-1)
    scratch = np.empty(min(BLOCK, g.size), g.dtype)
    for start in range(0, g.size, BLOCK):
        part = g[start : start + BLOCK]
        silu = scratch[: part.size]
        np.exp(np.negative(part, out=silu), out=silu)
        silu += 1
        np.divide(part, silu, out=silu)
        u[start : start + BLOCK] *= silu
    return up


def run_experts(ops: Native, experts: tuple[Expert, ...], x: Array, chosen: Array) -> Array:
    """`refmoe.spec.experts.run_experts`. x: [T, D]   chosen: integers [T, k]   returns: [T, k, D]"""
    if ops.watched:
        return spec_experts.run_experts(ops, experts, x, chosen)
    outputs = np.empty((chosen.size, x.shape[1]), x.dtype)
    flat = chosen.reshape(-1)
    for e in np.flatnonzero(np.bincount(flat, minlength=len(experts))).tolist():
        slots = np.flatnonzero(flat == e)
        rows, expert = x[slots // chosen.shape[1]], experts[e]
        hidden = swiglu(ops, ops.linear(rows, expert.w1), ops.linear(rows, expert.w3))
        outputs[slots] = ops.linear(hidden, expert.w2)
    return outputs.reshape(*chosen.shape, -1)


def attend(ops: Native, q: Array, cache: Cache, mask: Array) -> Array:
    """`refmoe.spec.attention.attend`, a context divided by the sum of its weights where the spec divides the weights.

    q: [T, H, d]   cache: S tokens   mask: [T, S]   returns: [T, H, d]
    """
    if ops.watched:
        return spec_attention.attend(ops, q, cache, mask)
    tokens, heads, head_dim = q.shape
    cached, kv_heads, _ = cache.k.shape
    share = heads // kv_heads
    grouped = (q / ops.sqrt(ops.array(head_dim))).reshape(tokens, kv_heads, share, head_dim).transpose(1, 2, 0, 3)
    weights = ops.matmul(grouped.reshape(kv_heads, share * tokens, head_dim), cache.k.transpose(1, 2, 0))
    if not mask.all():
        hidden = np.where(mask, weights.dtype.type(0), weights.dtype.type("-inf"))
        weights.reshape(heads, tokens, cached)[...] += hidden
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    mixed = ops.matmul(weights, cache.v.transpose(1, 0, 2))
    mixed /= weights.sum(axis=-1, keepdims=True)
    return mixed.reshape(heads, tokens, head_dim).transpose(1, 0, 2)


NATIVE_STEPS = Steps(attend=attend, run_experts=run_experts)
