"""Steps of the model for `NativeOps` that write where they read: the spec's functions with fewer arrays in between.

Only where nobody watches: a tap needs the arrays that are saved here, and the spec's step makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import numpy as np

from refmoe.ops.lanes import lanes
from refmoe.ops.native import SIDE_BY_SIDE
from refmoe.ops.native_cache import extend_cache
from refmoe.spec import attention as spec_attention
from refmoe.spec import experts as spec_experts
from refmoe.spec import norm as spec_norm
from refmoe.spec import rope as spec_rope
from refmoe.spec import router as spec_router
from refmoe.spec.attention import Cache
from refmoe.spec.experts import Expert
from refmoe.spec.model import Steps

Array = Any
Native = Any
"""A `NativeOps`. (Its weights can be read; those of the spec's own `Ops` have a shape and nothing else.)"""

Step = Callable[..., Any]

BLOCK = 1 << 14
"""Elements that are computed at a time: few enough to stay in a core's cache from one operation to the next."""
QUERIES = 64
"""Queries that attend at a time: what is hidden from all of them is not computed."""
OVERFLOW = 0.9
"""A gate below minus so much of the largest logarithm is left to the spec's form, whose exp cannot overflow."""
LOWEST_GATE = {np.dtype(t): -OVERFLOW * float(np.log(np.finfo(t).max)) for t in (np.float32, np.float64)}


def unwatched(spec_step: Step) -> Callable[[Step], Step]:
    """Decorates a step that is run where nobody watches; where somebody does, the spec's own is, to the bit."""

    def decorate(step: Step) -> Step:
        @wraps(step)
        def chosen(ops: Native, *arguments: Any) -> Any:
            return (spec_step if ops.watched else step)(ops, *arguments)

        return chosen

    return decorate


@unwatched(spec_norm.rms_norm)
def rms_norm(ops: Native, x: Array, gain: Array, eps: float) -> Array:
    """`refmoe.spec.norm.rms_norm`. x: [T, D]   gain: [D]   returns: [T, D]"""
    scale = np.vecdot(x, x)
    scale /= x.shape[1]
    scale += scale.dtype.type(eps)
    np.sqrt(scale, out=scale)
    y: Array = x / scale[:, None]
    y *= gain
    return y


@unwatched(spec_rope.rotary_table)
def rotary_table(ops: Native, positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """`refmoe.spec.rope.rotary_table`, computed once per call. positions: integers [T]   returns: two of [T, d/2]"""
    last = ops.turns
    if not last or last[0] is not positions or last[1:3] != [head_dim, theta]:
        last[:] = [positions, head_dim, theta, spec_rope.rotary_table(ops, positions, head_dim, theta)]
    table: tuple[Array, Array] = last[3]
    return table


@unwatched(spec_rope.rotate)
def rotate(ops: Native, x: Array, table: tuple[Array, Array]) -> Array:
    """`refmoe.spec.rope.rotate`. x: [T, heads, d]   table: two of [T, d/2]   returns: [T, heads, d]"""
    cos, sin = (part[:, None, :] for part in table)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    turned = np.empty_like(x)
    first, second = turned[..., :half], turned[..., half:]
    np.multiply(a, cos, out=first)
    first -= b * sin
    np.multiply(b, cos, out=second)
    second += a * sin
    return turned


def swiglu(ops: Native, gate: Array, up: Array) -> Array:
    """`refmoe.spec.experts.swiglu`: gate / (1 + exp(-gate)) * up, written over `up`.

    gate, up: [n, F], dense   returns: [n, F]
    """
    if gate.min() < LOWEST_GATE[gate.dtype]:
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


def run_expert(ops: Native, expert: Expert, x: Array) -> Array:
    """The output of `refmoe.spec.experts.run_expert`. x: [n, D]   returns: [n, D]"""
    return ops.linear(swiglu(ops, ops.linear(x, expert.w1), ops.linear(x, expert.w3)), expert.w2)


@unwatched(spec_experts.run_experts)
def run_experts(ops: Native, experts: tuple[Expert, ...], x: Array, chosen: Array) -> Array:
    """`refmoe.spec.experts.run_experts`. x: [T, D]   chosen: integers [T, k]   returns: [T, k, D]"""
    outputs = np.empty((chosen.size, x.shape[1]), x.dtype)
    flat = chosen.reshape(-1)

    def run(e: int, slots: Array) -> None:
        outputs[slots] = run_expert(ops, experts[e], x[slots // chosen.shape[1]])

    if len(chosen) == 1:
        for slot, e in enumerate(flat.tolist()):
            outputs[slot] = run_expert(ops, experts[e], x)[0]
        return outputs[None]
    counts = np.bincount(flat, minlength=len(experts))
    pieces = []
    # the largest first, so that no lane is left with it at the end
    for e in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist():
        pieces.append(partial(run, e, np.flatnonzero(flat == e)))
    side_by_side(pieces, chosen.size)
    return outputs.reshape(*chosen.shape, -1)


def side_by_side(pieces: Sequence[Callable[[], None]], rows: int) -> None:
    """Call all, in lanes where there are rows enough."""
    if rows >= SIDE_BY_SIDE:
        lanes().run(pieces)
    else:
        for piece in pieces:
            piece()


@unwatched(spec_attention.attend)
def attend(ops: Native, q: Array, cache: Cache, mask: Array) -> Array:
    """`refmoe.spec.attention.attend`, a context divided by the sum of its weights where the spec divides the weights.

    q: [T, H, d]   cache: S tokens   mask: [T, S]   returns: [T, H, d]
    """
    tokens, heads, head_dim = q.shape
    kv_heads = cache.k.shape[1]
    scaled = (q / ops.sqrt(ops.array(head_dim))).reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    context = np.empty_like(scaled)
    pieces = []
    for start in range(0, tokens, QUERIES):
        rows = slice(start, start + QUERIES)
        seen = np.flatnonzero(mask[rows].any(axis=0) if tokens > 1 else mask[0])
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        hidden = None
        if not mask[rows, keys].all():
            hidden = np.where(mask[rows, keys], q.dtype.type(0), q.dtype.type("-inf"))
        if tokens < SIDE_BY_SIDE:
            _mix(ops, scaled, cache, hidden, context, rows, keys, slice(None))
            continue
        for head in range(kv_heads):
            pieces.append(partial(_mix, ops, scaled, cache, hidden, context, rows, keys, slice(head, head + 1)))
    side_by_side(pieces[::-1], tokens)  # the last ones see most
    return context.reshape(tokens, heads, head_dim)


def _mix(
    ops: Native, q: Array, cache: Cache, hidden: Array | None, context: Array, rows: slice, keys: slice, at: slice
) -> None:
    """Some queries over some keys.   q, context: [T, K, H/K, d]   hidden: added to scores   at: heads of K"""
    some = q[rows, at].transpose(1, 2, 0, 3)  # [heads of K, H/K, t, d]
    kv_heads, share, tokens, head_dim = some.shape
    k, v = cache.k[keys, at], cache.v[keys, at]
    weights = ops.matmul(some.reshape(kv_heads, share * tokens, head_dim), k.transpose(1, 2, 0))
    if hidden is not None:
        by_query = weights.reshape(kv_heads, share, tokens, -1)
        by_query += hidden
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    mixed = ops.matmul(weights, v.transpose(1, 0, 2))
    mixed /= weights.sum(axis=-1, keepdims=True)
    context[rows, at] = mixed.reshape(kv_heads, share, tokens, head_dim).transpose(2, 0, 1, 3)


@unwatched(spec_router.route)
def route(ops: Native, x: Array, gate: Any, k: int) -> tuple[Array, Array]:
    """`refmoe.spec.router.route`. x: [T, D]   gate: [E, D]   returns: expert ids [T, k] and weights [T, k]"""
    logits = ops.linear(x, gate)
    experts = ops.top_k(logits, k)
    weights = logits[np.arange(len(x))[:, None], experts]
    weights -= weights[:, :1].copy()  # the first is the largest
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return experts, weights


@unwatched(spec_experts.combine)
def combine(ops: Native, outputs: Array, weights: Array) -> Array:
    """`refmoe.spec.experts.combine`. outputs: [T, k, D]   weights: [T, k]   returns: [T, D]"""
    return ops.matmul(weights[:, None, :], outputs)[:, 0]


NATIVE_STEPS = Steps(
    rms_norm=rms_norm, rotary_table=rotary_table, rotate=rotate, extend_cache=extend_cache, attend=attend, route=route,
    run_experts=run_experts, combine=combine,
)  # fmt: skip
