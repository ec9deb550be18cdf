# SPDX-License-Identifier: Apache-2.0
"""Bugs of tensor and expert parallelism: functions from (config, parameters, layout) to a wrong sharded model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.changed_weights import mapped
from refmoe.bugs.mutant import PARALLEL, mutant
from refmoe.checkpoints.weight import Weight
from refmoe.spec.config import Config
from refmoe.spec.experts import Expert
from refmoe.spec.model import Model, Parameters, attention_half, norm
from refmoe.steps.sharded import Layout, block, shard
from refmoe.steps.sharded.parameters import ExpertGroup, attention_rank
from refmoe.steps.sharded.steps import all_reduce, attention_partials


@mutant(
    "ep-global-id-as-local", breaks=["SHARD-10"], touches=["expert.gate", "expert.up"], severity="critical",
    changes=PARALLEL, fix="subtract the id of the group's first expert before indexing its own weights",
    sources=[
        "https://github.com/vllm-project/vllm-gaudi/pull/1796",
        "https://github.com/vllm-project/vllm-xpu-kernels/pull/405",
        "https://github.com/flashinfer-ai/flashinfer/issues/3547",
    ],
)  # fmt: skip
def global_id_as_local(config: Config, parameters: Parameters, layout: Layout) -> Model:
    """A group looks up its experts by their global ids among its own weights. The first group is right. The others take
    another expert if the id is in range, and answer zeros if it is not."""

    def wrong(group: ExpertGroup) -> ExpertGroup:
        own = group.experts
        nothing = tuple(silent(rank) for rank in own[0])
        ids = range(group.first, group.first + len(own))
        return replace(group, experts=tuple(own[e] if e < len(own) else nothing for e in ids))

    model = shard(config, parameters, layout)
    return with_layers(model, lambda layer: replace(layer, experts=tuple(map(wrong, layer.experts))))


@mutant(
    "ep-combine-with-dispatched-ids", breaks=["SHARD-11"], touches=["moe.output"], needs=["T>1"], severity="medium",
    changes=PARALLEL, fix="combine by the ids of the group's own tokens, not of those that it was sent",
    sources=["https://github.com/vllm-project/vllm/pull/52639"],
)  # fmt: skip
def combine_with_dispatched_ids(config: Config, parameters: Parameters, layout: Layout) -> Model:
    """A group reads the output of its token i where the i-th token that it received went. A slot whose expert is in
    another group comes back empty."""

    def moe(ops: Any, model: Model, layer: Any, x: Any) -> Any:
        steps, groups = model.steps, layer.experts
        chosen, weights = steps.route(ops, x, layer.router, model.config.experts_per_token)
        outputs = steps.run_experts(ops, groups, x, chosen)
        home = group_of(chosen, groups)  # [T, k]
        asked = home.copy()
        for g in range(len(groups)):
            mine = block(len(home), len(groups), g)
            dispatched = home[(home == g).any(axis=1)][: len(mine)]
            asked[mine.start : mine.start + len(dispatched)] = dispatched
        found = (home[:, :, None] == asked[:, None, :]).any(axis=-1)
        outputs = ops.where(found[:, :, None], outputs, 0.0)
        return ops.tap("moe.output", steps.combine(ops, outputs, weights))

    return with_steps(shard(config, parameters, layout), moe=moe)


@mutant(
    "tp-residual-counted-n-times", breaks=["SHARD-7", "LAYER-1"], touches=["residual"], changes=PARALLEL,
    fix="add the residual after the all-reduce, or on one rank only",
    sources=["https://github.com/mirage-project/mirage/pull/722"],
)  # fmt: skip
def residual_on_every_rank(config: Config, parameters: Parameters, layout: Layout) -> Model:
    """Every rank adds the residual to its part of the experts' output before the all-reduce. The sum then holds the
    residual once per rank."""

    def decoder_layer(ops: Any, model: Model, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
        h, cache = attention_half(ops, model, layer, x, positions, cache)
        output = model.steps.moe(ops, model, layer, norm(ops, model, "moe_norm", h, layer.moe_norm))
        return ops.tap("residual", all_reduce([output, *[h] * len(layer.attention)])), cache

    return with_steps(shard(config, parameters, layout), decoder_layer=decoder_layer)


@mutant(
    "tp-nonlinear-before-reduce", breaks=["SHARD-7"], touches=["moe_norm"], severity="medium", changes=PARALLEL,
    fix="reduce over the ranks before the norm, not after it",
    sources=["https://github.com/vllm-project/vllm-ascend/pull/14345"],
)  # fmt: skip
def norm_before_reduce(config: Config, parameters: Parameters, layout: Layout) -> Model:
    """The all-reduce comes after the norm instead of before it. Each rank norms its own part of the hidden state, and
    the normed parts are summed. The residual belongs to the part of the first rank."""

    def decoder_layer(ops: Any, model: Model, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
        steps, eps = model.steps, model.config.norm_eps
        normed = norm(ops, model, "attention_norm", x, layer.attention_norm)
        partial, cache = attention_partials(ops, model, layer, normed, positions, cache)
        h = ops.tap("attention_residual", x + ops.tap("attention.output", all_reduce(partial)))
        parts = [x + partial[0], *partial[1:]] if len(partial) > 1 else [h]
        gain = ops.vector(layer.moe_norm)
        normed = ops.tap("moe_norm", all_reduce([steps.rms_norm(ops, part, gain, eps) for part in parts]))
        return ops.tap("residual", h + steps.moe(ops, model, layer, normed)), cache

    return with_steps(shard(config, parameters, layout), decoder_layer=decoder_layer)


@mutant(
    "tp-kv-replication-wrong", breaks=["SHARD-4"], touches=["attention.scores", "attention.context"],
    severity="medium", changes=PARALLEL,
    fix="give rank r the key/value head r K // TP: neighbouring ranks share one",
    sources=[
        "https://github.com/sgl-project/sglang/pull/19086",
        "https://github.com/aws-neuron/aws-neuron-sdk/issues/1289",
    ],
)  # fmt: skip
def copies_dealt_in_turn(config: Config, parameters: Parameters, layout: Layout) -> Model:
    """With more ranks than key/value heads, the copies go to the ranks in turn (r mod K), but the query heads go in
    blocks."""

    def wrong(i: int, layer: Any) -> Any:
        heads = [rank % config.kv_heads for rank in range(layout.tensor)]
        return tuple(
            attention_rank(config, parameters.layers[i], rank.heads, range(head, head + 1))
            for rank, head in zip(layer.attention, heads, strict=True)
        )

    model = shard(config, parameters, layout)
    if layout.tensor <= config.kv_heads:
        return model
    each: Any = enumerate(model.parameters.layers)
    layers: Any = tuple(replace(layer, attention=wrong(i, layer)) for i, layer in each)
    return replace(model, parameters=replace(model.parameters, layers=layers))


def with_steps(model: Model, **steps: Any) -> Model:
    """The model with steps replaced."""
    return replace(model, steps=replace(model.steps, **steps))


def with_layers(model: Model, change: Any) -> Model:
    """The model with every layer changed."""
    layers: Any = tuple(map(change, model.parameters.layers))
    return replace(model, parameters=replace(model.parameters, layers=layers))


def silent(expert: Expert) -> Expert:
    """An expert of the same shapes whose weights are zeros."""

    def zeros(weight: Any) -> Weight:
        return mapped(weight, np.zeros_like)

    return Expert(*(zeros(weight) for weight in (expert.w1, expert.w2, expert.w3)))


def group_of(chosen: Any, groups: Any) -> Any:
    """The group that holds each chosen expert. chosen: integers [T, k]   returns: integers [T, k]"""
    firsts = np.array([group.first for group in groups])
    return np.searchsorted(firsts, chosen, side="right") - 1
