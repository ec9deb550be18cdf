"""The whole model: parameters, steps, one decoder layer, the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refmoe.spec.attention import Cache, attend, extend_cache, visible
from refmoe.spec.config import Config
from refmoe.spec.experts import Expert, combine, run_experts
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
    gate: Weight  # [E, D]
    experts: tuple[Expert, ...]  # E of them


@dataclass(frozen=True)
class Parameters:
    """All parameters of a model."""

    embedding: Weight  # [V, D]
    layers: tuple[Layer, ...]  # L of them
    final_norm: Weight  # [D]
    output: Weight  # [V, D]


def attention(ops: Ops, model: Model, layer: Layer, x: Array, positions: Array, cache: Cache | None) -> Any:
    """Project, rotate, extend the cache, attend, project back.

    ATTN-6  q, k, v = x times the transposes of wq, wk, wv, no biases; the rows of head h are h d .. h d + d - 1.
    ATTN-7  output = the contexts of all heads, head 0 first, times the transpose of wo.

    x: [T, D]   positions: integers [T]   returns: [T, D] and the extended cache
    """
    config, steps = model.config, model.steps
    heads = (x.shape[0], -1, config.head_dim)
    q = ops.tap("attention.q", ops.linear(x, layer.wq).reshape(heads))
    k = ops.tap("attention.k", ops.linear(x, layer.wk).reshape(heads))
    v = ops.tap("attention.v", ops.linear(x, layer.wv).reshape(heads))
    table = steps.rotary_table(ops, positions, config.head_dim, config.rope_theta)
    q_rope = ops.tap("attention.q_rope", steps.rotate(ops, q, table))
    k_rope = ops.tap("attention.k_rope", steps.rotate(ops, k, table))
    cache = steps.extend_cache(ops, cache, k_rope, v, positions)
    mask = steps.visible(positions, cache.positions, config.window)
    context = steps.attend(ops, q_rope, cache, mask)
    return ops.tap("attention.output", ops.linear(context.reshape(x.shape[0], -1), layer.wo)), cache


def moe(ops: Ops, model: Model, layer: Layer, x: Array) -> Array:
    """The sparse mixture of experts.

    MOE-1  y = the combination of the outputs of the chosen experts; router and experts read the same x.

    x: [T, D]   returns: [T, D]
    Jiang et al. 2024, section 2.1.
    """
    steps = model.steps
    chosen, weights = steps.route(ops, x, layer.gate, model.config.experts_per_token)
    outputs = steps.run_experts(ops, layer.experts, x, chosen)
    return ops.tap("moe.output", steps.combine(ops, outputs, weights))


def decoder_layer(ops: Ops, model: Model, layer: Layer, x: Array, positions: Array, cache: Cache | None) -> Any:
    """One decoder layer.

    LAYER-1  h = x + attention(norm(x)); x' = h + moe(norm(h)): norms before the blocks, residuals unnormed.
    LAYER-2  Each norm has its own gain.

    x: [T, D]   positions: integers [T]   returns: [T, D] and the extended cache
    """
    steps, eps = model.steps, model.config.norm_eps
    normed = ops.tap("attention_norm", steps.rms_norm(ops, x, ops.vector(layer.attention_norm), eps))
    attended, cache = steps.attention(ops, model, layer, normed, positions, cache)
    h = ops.tap("attention_residual", x + attended)
    normed = ops.tap("moe_norm", steps.rms_norm(ops, h, ops.vector(layer.moe_norm), eps))
    return ops.tap("residual", h + steps.moe(ops, model, layer, normed)), cache


@dataclass(frozen=True)
class Steps:
    """The steps of the forward pass. A variation of the model is this record with one of them replaced."""

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
    parameters = model.parameters
    x = ops.tap("embedding", ops.embed(parameters.embedding, tokens))
    extended = []
    for i, layer in enumerate(parameters.layers):
        cache = None if caches is None else caches[i]
        x, cache = model.steps.decoder_layer(ops.within(f"layers.{i}."), model, layer, x, positions, cache)
        extended.append(cache)
    x = ops.tap("final_norm", model.steps.rms_norm(ops, x, ops.vector(parameters.final_norm), model.config.norm_eps))
    return ops.tap("logits", ops.linear(x, parameters.output)), tuple(extended)
