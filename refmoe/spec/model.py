# SPDX-License-Identifier: Apache-2.0
"""The whole model: parameters, steps, one decoder layer, the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refmoe.spec.attention import Cache, attend, attention, extend_cache, visible
from refmoe.spec.config import Config
from refmoe.spec.experts import Expert, combine, moe, run_experts
from refmoe.spec.interface import Array, Ops, Weight
from refmoe.spec.norm import rms_norm
from refmoe.spec.rope import rotary_table, rotate
from refmoe.spec.router import route


@dataclass(frozen=True)
class Layer:
    """Parameters of one decoder layer. Projections are [out, in]: y = x w^T."""

    attention_norm: Weight  # [D]
    wq: Weight  # [H d, D]
    wk: Weight  # [K d, D]
    wv: Weight  # [K d, D]
    wo: Weight  # [D, H d]
    moe_norm: Weight  # [D]
    router: Weight  # [E, D]
    experts: tuple[Expert, ...]  # E of them


@dataclass(frozen=True)
class Parameters:
    """All parameters of a model."""

    embedding: Weight  # [V, D]
    layers: tuple[Layer, ...]  # L of them
    final_norm: Weight  # [D]
    output: Weight  # [V, D]


def decoder_layer(
    ops: Ops, model: Model, layer: Layer, x: Array, positions: Array, cache: Cache | None
) -> tuple[Array, Cache]:
    """One decoder layer: its attention half, then its mixture-of-experts half.

    LAYER-1  h = x + attention(norm(x)); x' = h + moe(norm(h)): norms before the blocks, residuals unnormed.
    LAYER-2  Each norm has its own gain.

    x: [T, D]   positions: integers [T]   returns: [T, D] and the extended cache
    """
    h, cache = attention_half(ops, model, layer, x, positions, cache)
    return moe_half(ops, model, layer, h), cache


def attention_half(
    ops: Ops, model: Model, layer: Layer, x: Array, positions: Array, cache: Cache | None
) -> tuple[Array, Cache]:
    """h = x + attention(norm(x)) of LAYER-1. x: [T, D]   returns: [T, D] and the extended cache"""
    normed = norm(ops, model, "attention_norm", x, layer.attention_norm)
    attended, cache = model.steps.attention(ops, model, layer, normed, positions, cache)
    return ops.tap("attention_residual", x + attended), cache


def moe_half(ops: Ops, model: Model, layer: Layer, h: Array) -> Array:
    """x' = h + moe(norm(h)) of LAYER-1. h: [T, D]   returns: [T, D]"""
    normed = norm(ops, model, "moe_norm", h, layer.moe_norm)
    return ops.tap("residual", h + model.steps.moe(ops, model, layer, normed))


def norm(ops: Ops, model: Model, tap: str, x: Array, gain: Weight) -> Array:
    """The model's norm with this gain, under the name of its tap. x: [T, D]   gain: [D]   returns: [T, D]"""
    return ops.tap(tap, model.steps.rms_norm(ops, x, ops.vector(gain), model.config.norm_eps))


@dataclass(frozen=True)
class Steps:
    """The steps of the model. A record with one of them replaced states the model otherwise, or another model."""

    rms_norm: Callable[..., Array] = rms_norm
    rotary_table: Callable[..., tuple[Array, Array]] = rotary_table
    rotate: Callable[..., Array] = rotate
    extend_cache: Callable[..., Cache] = extend_cache
    visible: Callable[..., Array] = visible
    attend: Callable[..., Array] = attend
    route: Callable[..., tuple[Array, Array]] = route
    run_experts: Callable[..., Array] = run_experts
    combine: Callable[..., Array] = combine
    attention: Callable[..., tuple[Array, Cache]] = attention
    moe: Callable[..., Array] = moe
    decoder_layer: Callable[..., tuple[Array, Cache]] = decoder_layer


@dataclass(frozen=True)
class Model:
    """A configuration, its parameters and the steps to run."""

    config: Config
    parameters: Parameters
    steps: Steps = Steps()


Caches = tuple[Cache, ...]
"""One cache per layer, of one sequence."""


def embed(ops: Ops, model: Model, tokens: Array) -> Array:
    """The hidden state before the first layer (MODEL-1).

    INPUT-1  Every token id is an integer with 0 <= id < V. An id outside is not defined: the caller refuses it.

    tokens: integers [T], T >= 1   returns: [T, D]
    """
    return ops.tap("embedding", ops.embed(model.parameters.embedding, tokens))


def run_layers(
    ops: Ops, model: Model, layers: range, x: Array, positions: Array, caches: Caches | None = None
) -> tuple[Array, Caches]:
    """Some layers, in order (MODEL-2).

    x: [T, D]   positions: integers [T]   caches: one for each of these layers, or None where nothing is cached
    returns: [T, D] and the extended caches of these layers
    """
    extended = []
    for i in layers:
        before = None if caches is None else caches[i - layers.start]
        inner = ops.within(f"layers.{i}.")
        x, cache = model.steps.decoder_layer(inner, model, model.parameters.layers[i], x, positions, before)
        extended.append(cache)
    return x, tuple(extended)


def head(ops: Ops, model: Model, x: Array) -> Array:
    """The logits after the last layer (MODEL-3). x: [T, D]   returns: [T, V]"""
    normed = norm(ops, model, "final_norm", x, model.parameters.final_norm)
    return ops.tap("logits", ops.linear(normed, model.parameters.output))


def forward(
    ops: Ops, model: Model, tokens: Array, positions: Array, caches: Caches | None = None
) -> tuple[Array, Caches]:
    """Logits for every new token of one sequence, given the caches of the tokens before them.

    MODEL-1  The hidden state starts as the token's row of the embedding, unscaled.
    MODEL-2  Layers run in order, each on the output of the one before.
    MODEL-3  logits = norm(x) times the transpose of the output matrix, which is not tied to the embedding.
    MODEL-4  One call with all tokens, calls with pieces of them, and calls with one token at a time compute
             the same function: a call sees its own tokens and the cached ones.
    MODEL-5  Sequences do not see each other: a batch is several calls with a set of caches each.

    tokens: integers [T], T >= 1   positions: integers [T]   returns: [T, V] and the extended caches
    """
    x, extended = run_layers(ops, model, range(model.config.layers), embed(ops, model, tokens), positions, caches)
    return head(ops, model, x), extended
