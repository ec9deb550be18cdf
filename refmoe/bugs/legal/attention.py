# SPDX-License-Identifier: Apache-2.0
"""Legal ways to rotate, to count positions and to attend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.arithmetic.formats import nearest
from refmoe.bugs.legal.variant import Engine, legal, with_steps
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run

OFFSET = 1000
"""Positions that `uniform-position-offset` adds: enough to turn every angle."""
FLASH_BLOCK = 16
"""Keys that flash attention takes at a time: the smallest block of a kernel."""


@legal("interleaved-pairs", leaves_out=["attention.q", "attention.k", "attention.q_rope", "attention.k_rope"])
def interleaved_pairs(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """Queries and keys are in another basis (ROPE-3). Elements 2i and 2i + 1 of a head form a rotary pair, and the rows
    of wq and wk are in that order."""
    half = config.head_dim // 2
    order = [element for i in range(half) for element in (i, i + half)]

    def rows(weight: Any) -> Weight:
        def read() -> Any:
            return weight.read().reshape(-1, config.head_dim, config.dim)[:, order].reshape(weight.shape)

        return Weight(name=weight.name, shape=weight.shape, dtype=weight.dtype, source=read, origin=weight.origin)

    def rotate(ops: Any, x: Any, table: Any) -> Any:
        apart = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        return CUT_STEPS.rotate(ops, apart, table)[..., order]

    layers = tuple(replace(layer, wq=rows(layer.wq), wk=rows(layer.wk)) for layer in parameters.layers)
    return Engine(with_steps(config, replace(parameters, layers=layers), rotate=rotate), runs, policy)


@legal("uniform-position-offset", leaves_out=["attention.q_rope", "attention.k_rope"])
def uniform_position_offset(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """All positions are counted from another start. Attention depends only on their differences."""
    moved = (replace(run, positions=tuple(position + OFFSET for position in run.positions)) for run in runs)
    return Engine(with_steps(config, parameters), tuple(moved), policy)


@legal("flash-softmax", leaves_out=["attention.scores", "attention.probs"])
def flash_softmax(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """Keys are taken in blocks. The largest score so far is subtracted, and exponentials are stored unnormalised. When
    the largest score grows, the sums are rescaled. The division comes at the end."""

    def low(x: Any) -> Any:
        return nearest(x, policy.accumulation)

    def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
        tokens, heads, head_dim = q.shape
        k, v = (part.repeat(heads // part.shape[1], axis=1).transpose(1, 0, 2) for part in (cache.k, cache.v))
        scores = low(low(ops.matmul(q.transpose(1, 0, 2), k.transpose(0, 2, 1))) / low(math.sqrt(head_dim)))
        scores = np.where(mask[None], scores, -np.inf)  # [H, T, S]
        largest, total = np.full((heads, tokens, 1), -np.inf), np.zeros((heads, tokens, 1))
        mixed = np.zeros((heads, tokens, head_dim))
        for start in range(0, k.shape[1], FLASH_BLOCK):
            keys = slice(start, start + FLASH_BLOCK)
            now = np.maximum(largest, scores[..., keys].max(axis=-1, keepdims=True))
            shift = np.where(np.isinf(now), 0.0, now)  # the scores are all -inf if a query sees no key of the block
            weight, scale = low(ops.exp(low(scores[..., keys] - shift))), low(ops.exp(low(largest - shift)))
            total = low(low(total * scale) + low(ops.sum(weight, axis=-1))[..., None])
            mixed = low(low(mixed * scale) + low(ops.matmul(nearest(weight, policy.storage), v[:, keys])))
            largest = now
        return ops.tap("attention.context", (mixed / total).transpose(1, 0, 2))

    return Engine(with_steps(config, parameters, attend=attend), runs, policy)


@legal("scaled-query")
def scaled_query(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """The query is divided by sqrt(head_dim), in the dtype of accumulation, before the product with the keys."""
    cuts = {**policy.cuts, "attention.query": policy.accumulation}
    return Engine(with_steps(config, parameters), runs, replace(policy, scale="query", cuts=cuts))
