# SPDX-License-Identifier: Apache-2.0
"""Steps of the model for `NativeOps` that work in place: the spec's functions with fewer intermediate arrays.

They run only where no tap is set. A tap needs the arrays that these steps avoid, so the spec's step runs instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.native.lanes import lanes
from refmoe.arithmetic.native.ops import SIDE_BY_SIDE, Part
from refmoe.spec import attention as spec_attention
from refmoe.spec import experts as spec_experts
from refmoe.spec import norm as spec_norm
from refmoe.spec import router as spec_router
from refmoe.spec.experts import Expert
from refmoe.spec.model import Steps
from refmoe.steps import grouped, native_attention
from refmoe.steps.native_cache import extend_cache

Native = Any
"""A `NativeOps`, typed as Any because its weights can be read, while those of the spec's `Ops` only have a shape."""

Step = Callable[..., Any]

BLOCK = 1 << 18
"""Elements that are computed at a time: few enough to stay in a core's cache from one operation to the next."""
OVERFLOW = 0.9
"""Gates below -OVERFLOW * log(the largest number) are left to the spec's formula, whose exp cannot overflow."""
LOWEST_GATE = {np.dtype(t): -OVERFLOW * float(np.log(np.finfo(t).max)) for t in (np.float32, np.float64)}


def unwatched(spec_step: Step) -> Callable[[Step], Step]:
    """Decorates a step that runs where no tap is set. Where one is set, `spec_step` runs."""

    def decorate(step: Step) -> Step:
        @wraps(step)
        def chosen(ops: Native, *arguments: Any) -> Any:
            return (spec_step if ops.watched else step)(ops, *arguments)

        return chosen

    return decorate


@unwatched(spec_norm.rms_norm)
def rms_norm(ops: Native, x: Array, gain: Array, eps: float) -> Array:
    """`refmoe.spec.norm.rms_norm`. x: [T, D]   gain: [D]   returns: [T, D]"""
    if len(x) == 1:  # for one row, calling NumPy costs more than the computation
        mean_square = float(x[0] @ x[0]) / x.shape[1]
        normed: Array = x * (1 / math.sqrt(mean_square + eps))
        normed *= gain
        return normed
    scale = np.vecdot(x, x)
    scale /= x.shape[1]
    scale += scale.dtype.type(eps)
    np.sqrt(scale, out=scale)
    y: Array = x / scale[:, None]
    y *= gain
    return y


def swiglu(ops: Native, gate: Array, up: Array) -> Array:
    """`refmoe.spec.experts.swiglu`: gate / (1 + exp(-gate)) * up. gate, up, returns: [n, F]"""
    if gate.min() < LOWEST_GATE[gate.dtype]:
        return spec_experts.swiglu(ops, gate, up)
    hidden = np.empty(gate.shape, gate.dtype)
    rows = max(BLOCK // gate.shape[1], 1)
    for start in range(0, len(gate), rows):
        g, h = gate[start : start + rows], hidden[start : start + rows]
        np.exp(np.negative(g, out=h), out=h)
        h += 1
        np.divide(g, h, out=h)
        h *= up[start : start + rows]
    return hidden


def run_expert(ops: Native, expert: Any, x: Array, outputs: Array) -> None:
    """`refmoe.spec.experts.run_expert`, with the result written to `outputs`. x, outputs: [n, D]"""
    width: int = expert.w1.shape[0]
    both = np.empty((len(x), 2 * width), ops.dtype)
    ops.multiply(x, (Part(expert.w1), Part(expert.w3)), both)
    ops.multiply(swiglu(ops, both[:, :width], both[:, width:]), (Part(expert.w2),), outputs)


def run_for_one(ops: Native, experts: list[Any], x: Array) -> Array:
    """The outputs of some experts for one token, with one `swiglu` for all. x: [1, D]   returns: [k, D]"""
    width: int = experts[0].w1.shape[0]
    both = np.empty((len(experts), 2 * width), x.dtype)
    outputs = np.empty((len(experts), x.shape[1]), x.dtype)
    rows = [slice(i, i + 1) for i in range(len(experts))]
    ready = ops.ready(x)
    for expert, row in zip(experts, rows, strict=True):
        ops.multiply(ready, (Part(expert.w1), Part(expert.w3)), both[row])
    hidden = swiglu(ops, both[:, :width], both[:, width:])
    for expert, row in zip(experts, rows, strict=True):
        ops.multiply(hidden[row], (Part(expert.w2),), outputs[row])
    return outputs


@unwatched(grouped.run_experts)
def run_experts(ops: Native, experts: tuple[Expert, ...], x: Array, chosen: Array) -> Array:
    """`refmoe.spec.experts.run_experts`. x: [T, D]   chosen: integers [T, k]   returns: [T, k, D]"""
    tokens, k = chosen.shape
    if tokens == 1:
        return run_for_one(ops, [experts[e] for e in chosen[0].tolist()], x)[None]
    order, counts = ops.group(chosen.reshape(-1), len(experts))
    rows = x.take(order // k, axis=0)  # the rows of each expert are consecutive
    outputs = np.empty(rows.shape, x.dtype)
    ends = np.cumsum(counts).tolist()
    pieces = []
    # the largest first, so that no lane starts a large piece when the others are done
    for e in sorted(range(len(experts)), key=lambda e: -counts[e]):
        own = slice(ends[e] - counts[e], ends[e])
        if counts[e]:
            pieces.append(partial(run_expert, ops, experts[e], rows[own], outputs[own]))
    if len(rows) >= SIDE_BY_SIDE:
        lanes().run(pieces)
    else:
        for piece in pieces:
            piece()
    return outputs.take(ops.inverse(order), axis=0).reshape(tokens, k, -1)


@unwatched(spec_router.route)
def route(ops: Native, x: Array, router: Any, k: int) -> tuple[Array, Array]:
    """`refmoe.spec.router.route`. x: [T, D]   router: [E, D]   returns: expert ids [T, k] and weights [T, k]"""
    logits = ops.linear(x, router)
    experts = ops.top_k(logits, k)
    weights = logits[np.arange(len(x))[:, None], experts]
    weights -= weights[:, :1].copy()  # the first logit is the largest
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=-1, keepdims=True)
    return experts, weights


@unwatched(spec_experts.combine)
def combine(ops: Native, outputs: Array, weights: Array) -> Array:
    """`refmoe.spec.experts.combine`. outputs: [T, k, D]   weights: [T, k]   returns: [T, D]"""
    if len(weights) == 1:
        return weights @ outputs[0]
    return ops.matmul(weights[:, None, :], outputs)[:, 0]


NATIVE_STEPS = Steps(
    rms_norm=rms_norm, extend_cache=extend_cache, attend=grouped.attend, route=route, run_experts=run_experts,
    combine=combine, attention=unwatched(spec_attention.attention)(native_attention.attention),
)  # fmt: skip
