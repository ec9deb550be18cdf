# SPDX-License-Identifier: Apache-2.0
"""The steps of the model over the CUDA kernels, with the spec's own taps.

The kernels apply at float32, to experts whose weights are all stored in one dtype. Elsewhere the spec's steps run.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.spec import experts as spec_experts
from refmoe.spec import norm as spec_norm
from refmoe.spec import rope as spec_rope
from refmoe.spec import router as spec_router
from refmoe.spec.experts import Expert
from refmoe.spec.interface import Weight
from refmoe.spec.model import Layer, Model, Steps
from refmoe.spec.softmax import softmax
from refmoe.steps import grouped

Gpu = Any
"""A `CupyOps`, typed as Any because its weights can be read, while those of the spec's `Ops` only have a shape."""
Stacks: TypeAlias = tuple[Array, Array, Array]
"""w1 and w3 [E, F, D], w2 [E, D, F]."""


def rms_norm(ops: Gpu, x: Array, gain: Array, eps: float) -> Array:
    """`refmoe.spec.norm.rms_norm`. x: [T, D]   gain: [D]   returns: [T, D]"""
    if ops.kernels is None:
        return spec_norm.rms_norm(ops, x, gain, eps)
    return ops.kernels.rms_norm(ops.xp.ascontiguousarray(x), gain, eps)


def rotate(ops: Gpu, x: Array, table: tuple[Array, Array]) -> Array:
    """`refmoe.spec.rope.rotate`. x: [T, heads, d]   table: two of [T, d/2]   returns: [T, heads, d]"""
    if ops.kernels is None:
        return spec_rope.rotate(ops, x, table)
    return ops.kernels.rotate(ops.xp.ascontiguousarray(x), *table)


def route(ops: Gpu, x: Array, router: Weight, k: int) -> tuple[Array, Array]:
    """`refmoe.spec.router.route`. x: [T, D]   router: [E, D]   returns: expert ids [T, k], weights [T, k]"""
    if ops.kernels is None:
        return spec_router.route(ops, x, router, k)
    logits = ops.tap("router.logits", ops.linear(x, router))
    chosen, weights = ops.kernels.route(ops.xp.ascontiguousarray(logits), k)
    experts = ops.tap("router.experts", chosen)
    if experts is not chosen:  # the tap has replaced the choice
        weights = softmax(ops, ops.gather(logits, experts))
    return experts, ops.tap("router.weights", weights)


def expert_outputs(ops: Gpu, experts: tuple[Expert, ...], x: Array, chosen: Array) -> tuple[Array, Array] | None:
    """Every slot's expert output, in the order that is fastest to compute, and the row of each slot.

    x: [T, D]   chosen: int32 [T, k]
    returns: outputs [T k, D] and position, int32 [T, k], the row of slot j of token t; None where the kernels cannot
        read these weights
    """
    stacks = None if ops.kernels is None else ops.stacked(experts)
    if stacks is None:
        return None
    x = ops.xp.ascontiguousarray(x)
    run = _in_place if ops.few(x) else _sorted
    parts, position = run(ops, stacks, x, chosen)
    if ops.watched:
        rows = position.reshape(-1)
        parts = [
            ops.tap(f"expert.{name}", part[rows].reshape(*chosen.shape, -1)).reshape(chosen.size, -1)
            for name, part in zip(("gate", "up", "hidden", "output"), parts, strict=True)
        ]
        position = _slot_order(ops, chosen)
    return ops.xp.ascontiguousarray(parts[-1]), position


def _slot_order(ops: Gpu, chosen: Array) -> Array:
    """The rows of slots where rows are in the order of slots. chosen: [T, k]   returns: int32 [T, k]"""
    return ops.xp.arange(chosen.size, dtype=np.int32).reshape(chosen.shape)


def _in_place(ops: Gpu, stacks: Stacks, x: Array, chosen: Array) -> tuple[list[Array], Array]:
    """Kernels read the stacked weights in place, without a copy to the host.

    returns: gate, up, hidden and output, and position
    """
    w1, w3, w2 = stacks
    gate, up, hidden = ops.kernels.expert_hidden(w1, w3, x, chosen)
    output = ops.kernels.expert_output(w2, hidden, chosen)
    return [part.reshape(chosen.size, -1) for part in (gate, up, hidden, output)], _slot_order(ops, chosen)


def _sorted(ops: Gpu, stacks: Stacks, x: Array, chosen: Array) -> tuple[list[Array], Array]:
    """Rows are sorted by expert, and each expert takes three matrix products.

    returns: gate, up, hidden and output, and position
    """
    w1, w3, w2 = stacks
    order, position, offsets = ops.kernels.sort_pairs(chosen, len(w1))
    bounds = offsets.tolist()  # the only copy to the host, which launches the matrix products
    rows = ops.kernels.gather_rows(x, order, chosen.shape[1])
    gate, up = _by_expert(ops, rows, w1, bounds), _by_expert(ops, rows, w3, bounds)
    hidden = ops.kernels.swiglu(gate, up)
    return [gate, up, hidden, _by_expert(ops, hidden, w2, bounds)], position


def _by_expert(ops: Gpu, rows: Array, matrices: Array, bounds: list[int]) -> Array:
    """Each row times the transpose of its expert's matrix.

    rows: [n, m], sorted by expert   matrices: [E, p, m]   bounds: E + 1 row numbers   returns: [n, p]
    """
    result = ops.xp.empty((len(rows), matrices.shape[1]), rows.dtype)
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            ops.multiply(rows[start:stop], matrices[expert], result[start:stop])
    return result


def moe(ops: Gpu, model: Model, layer: Layer, x: Array) -> Array:
    """`refmoe.spec.experts.moe`, which combines each token's outputs without sorting them back. x, returns: [T, D]"""
    chosen, weights = model.steps.route(ops, x, layer.router, model.config.experts_per_token)
    ids = ops.xp.ascontiguousarray(chosen).astype(np.int32, copy=False)
    found = expert_outputs(ops, layer.experts, x, ids)
    if found is None:
        outputs = grouped.run_experts(ops, layer.experts, x, chosen)
        return ops.tap("moe.output", spec_experts.combine(ops, outputs, weights))
    outputs, position = found
    return ops.tap("moe.output", ops.kernels.combine(outputs, position, ops.xp.ascontiguousarray(weights)))


CUPY_STEPS: Any = Steps(rms_norm=rms_norm, rotate=rotate, attend=grouped.attend, route=route, moe=moe)
"""The steps of the spec, with those that have a kernel replaced."""
