# SPDX-License-Identifier: Apache-2.0
"""Bugs of the router."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.bugs.forced_rounding import low_precision, rounded
from refmoe.bugs.mutant import mutant
from refmoe.spec.model import attention_half, norm
from refmoe.steps.rounding import cut_again
from refmoe.steps.rounding import run_experts as right_experts

EXPERTS = ("expert.gate", "expert.up", "expert.output")
"""The taps that an expert's weights compute."""

JITTER = 0.01
"""The largest distance of a random factor from 1: `router_jitter_noise` of the models that train with it."""

BIASES = (0.0, 0.125, 0.0625)
"""The biases of the experts, repeated. They are of the size of a probability among a dozen experts."""


def logits_of(ops: Any, x: Any, router: Any) -> Any:
    """ROUTE-1. x: [T, D]   router: [E, D]   returns: [T, E]"""
    return ops.tap("router.logits", ops.linear(x, router))


def choose(ops: Any, scores: Any, k: int) -> Any:
    """ROUTE-2 on any scores. scores: [T, E]   returns: integers [T, k]"""
    return ops.tap("router.experts", ops.top_k(scores, k))


def read(ops: Any, logits: Any) -> Any:
    """The logits after the cut point before the softmax. logits: [T, E]"""
    return cut_again(ops, "router.softmax_input", "router.logits", logits)


def probabilities(ops: Any, logits: Any) -> Any:
    """Softmax over all experts. logits: [T, E]   returns: [T, E]"""
    return ops.softmax(read(ops, logits), None)


# ---- weights


@mutant(
    "router-no-renorm", breaks=["ROUTE-4"], touches=["router.weights"], step="route",
    fix="divide the probabilities of the chosen by their sum", severity="critical",
    sources=[
        "https://github.com/TransformerLensOrg/TransformerLens/pull/1668",
        "https://github.com/HabanaAI/vllm-fork/pull/73",
        "https://github.com/NVIDIA/TensorRT-LLM/pull/2752",
    ],
)  # fmt: skip
def softmax_over_all(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The weights are the chosen probabilities of a softmax over all experts. They are not renormalised, and sum to
    less than 1."""
    logits = logits_of(ops, x, router)
    experts = choose(ops, logits, k)
    return experts, ops.tap("router.weights", ops.gather(probabilities(ops, logits), experts))


@mutant(
    "router-raw-logit-weights", breaks=["ROUTE-4"], touches=["router.weights"], step="route",
    fix="take the softmax of the chosen logits",
    sources=["https://github.com/sgl-project/sglang/pull/35160"],
)  # fmt: skip
def logits_as_weights(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The chosen logits themselves are the weights: a top-k without renormalisation returned its scores."""
    logits = logits_of(ops, x, router)
    experts = choose(ops, logits, k)
    return experts, ops.tap("router.weights", ops.gather(logits, experts))


@mutant(
    "router-double-softmax", breaks=["ROUTE-4"], touches=["router.weights"], step="route",
    fix="take one softmax: what the top-k is given are probabilities already, or what it returns is", severity="medium",
    sources=["https://github.com/huggingface/transformers/pull/45111"],
)  # fmt: skip
def softmax_twice(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The weights are a softmax over the chosen probabilities of a softmax, which makes them nearly equal."""
    logits = logits_of(ops, x, router)
    experts = choose(ops, logits, k)
    chosen = ops.gather(probabilities(ops, logits), experts)
    return experts, ops.tap("router.weights", ops.softmax(chosen, None))


@mutant(
    "router-renorm-wrong-axis", breaks=["ROUTE-4", "MODEL-4"], touches=["router.weights"], step="route",
    fix="sum over the experts of a token, not over tokens", severity="medium",
    sources=["https://github.com/databricks/megablocks/pull/87"],
)  # fmt: skip
def divided_by_other_tokens(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The weights of a rank are divided by their sum over the tokens: the last axis of the sum is the axis of
    tokens."""
    logits = logits_of(ops, x, router)
    experts = choose(ops, logits, k)
    chosen = ops.gather(probabilities(ops, logits), experts)
    return experts, ops.tap("router.weights", chosen / ops.sum(chosen, axis=0)[None])


@mutant(
    "router-softmax-over-tokens", breaks=["ROUTE-2", "ROUTE-4", "MODEL-4"],
    touches=["router.experts", "router.weights"], step="route", fix="take the softmax over the last axis, the experts",
    severity="medium",
    sources=[
        "https://github.com/deepspeedai/DeepSpeed/pull/2110",
        "https://github.com/huggingface/transformers/pull/42114",
    ],
)  # fmt: skip
def softmax_down_the_column(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The softmax runs over the tokens (dim=1 of a 3-D array): the probabilities of an expert sum to 1 over the
    call."""
    logits = logits_of(ops, x, router)
    probs = ops.softmax(read(ops, logits).transpose(1, 0), None).transpose(1, 0)
    experts = choose(ops, probs, k)
    chosen = ops.gather(probs, experts)
    return experts, ops.tap("router.weights", chosen / ops.sum(chosen, axis=-1)[:, None])


@mutant(
    "router-lowprec-logits", breaks=["ROUTE-1", "ROUTE-4"], needs=["LOWPREC"], step="route", by_size=True,
    touches=["router.logits", "router.experts", "router.weights"],
    fix="compute the router's softmax in float32, and its logits in the model's dtype or better",
    sources=[
        "https://github.com/ml-explore/mlx-examples/pull/112",
        "https://github.com/sgl-project/sglang-jax/issues/698",
        "https://github.com/NVIDIA/TensorRT-Model-Connect/pull/930",
        "https://github.com/deepspeedai/DeepSpeed/pull/809",
    ],
)  # fmt: skip
def softmax_in_low_precision(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """Every operation for logits, softmax and weights is rounded to bfloat16, or to the low dtype of the model."""
    low = low_precision(ops.policy)
    logits = ops.tap("router.logits", rounded(ops.linear(rounded(x, low), router), low))
    weight = rounded(ops.exp(rounded(logits - ops.max(logits, axis=-1)[:, None], low)), low)
    probs = rounded(weight / rounded(ops.sum(weight, axis=-1), low)[:, None], low)
    experts = choose(ops, probs, k)
    chosen = ops.gather(probs, experts)
    return experts, ops.tap("router.weights", rounded(chosen / rounded(ops.sum(chosen, axis=-1), low)[:, None], low))


@mutant(
    "router-bias-in-weights", breaks=["ROUTE-1", "ROUTE-2", "ROUTE-4"], touches=["router.experts", "router.weights"],
    step="route", fix="gather the weights from the probabilities without the bias; Mixtral has none", severity="low",
    sources=[
        "https://github.com/PaddlePaddle/PaddleFormers/pull/3452",
        "https://github.com/MetaX-MACA/vLLM-metax/issues/270",
    ],
)  # fmt: skip
def biased(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """A bias, which some routers add to choose experts, is present. The weights are gathered from the biased scores."""
    logits = logits_of(ops, x, router)
    scores = probabilities(ops, logits) + np.resize(BIASES, logits.shape[-1])[None]
    experts = choose(ops, scores, k)
    chosen = ops.gather(scores, experts)
    return experts, ops.tap("router.weights", chosen / ops.sum(chosen, axis=-1)[:, None])


@mutant(
    "router-weights-order-mismatch", breaks=["ROUTE-4"], touches=["router.weights"], step="route",
    fix="gather the weights by the ids as they are returned, instead of sorting them",
    sources=["https://github.com/sgl-project/sglang/pull/8125"],
)  # fmt: skip
def weights_of_another_order(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """A partial sort leaves the ids in no order (here: by id), but the weights beside them are sorted from large to
    small."""
    logits = logits_of(ops, x, router)
    falling = ops.top_k(logits, k)
    experts = ops.tap("router.experts", np.sort(falling, axis=-1))
    return experts, ops.tap("router.weights", ops.weigh(read(ops, logits), falling))


# ---- choices


@mutant(
    "router-tie-break-high-index", breaks=["ROUTE-3"], touches=["router.experts"], needs=["TIE-EDGE"], step="route",
    fix="of equal logits take the lower id: sort stably by falling logit", severity="low",
    judged_by="+ties=lower+compared=stored",
    sources=[
        "https://github.com/vllm-project/vllm/pull/52679",
        "https://github.com/vllm-project/vllm/pull/54403",
        "https://github.com/microsoft/onnxruntime/pull/28980",
    ],
)  # fmt: skip
def higher_id_first(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """Of equal logits the higher id comes first: the last k of an ascending sort are read backwards."""
    logits = logits_of(ops, x, router)
    experts = logits.shape[-1] - 1 - ops.top_k(logits[:, ::-1], k)
    experts = ops.tap("router.experts", experts)
    return experts, ops.tap("router.weights", ops.weigh(read(ops, logits), experts))


@mutant(
    "router-wrong-k", breaks=["ROUTE-2", "ROUTE-4"], touches=["router.weights", "moe.output"], step="moe",
    fix="choose num_experts_per_tok experts, no more",
    sources=[
        "https://github.com/ml-explore/mlx-examples/issues/671",
        "https://github.com/ggml-org/llama.cpp/pull/4406",
    ],
)  # fmt: skip
def one_expert_too_many(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """One expert more than configured is chosen, weighted and added. The engine shows only the first k slots."""
    k, quiet = model.config.experts_per_token, untapped(ops)
    logits = logits_of(ops, x, layer.router)
    ids = ops.top_k(logits, min(k + 1, model.config.experts))
    chosen, more = ops.tap("router.experts", ids[:, :k]), ids[:, k:]
    weights = ops.weigh(read(ops, logits), np.concatenate([chosen, more], axis=1))
    shown, hidden = ops.tap("router.weights", weights[:, :k]), quiet.tap("router.weights", weights[:, k:])
    outputs = model.steps.run_experts(ops, layer.experts, x, chosen)
    if more.size:
        outputs = ops.concatenate([outputs, model.steps.run_experts(quiet, layer.experts, x, more)], axis=1)
        shown = ops.concatenate([shown, hidden], axis=1)
    return ops.tap("moe.output", model.steps.combine(ops, outputs, shown))


def untapped(ops: Any) -> Any:
    """The ops without their tap."""
    quiet = copy.copy(ops)
    quiet._tap = None
    return quiet


@mutant(
    "router-index-off-by-one", breaks=["EXPERT-3"], touches=EXPERTS, step="run_experts",
    fix="look for ids that count from one, and for a sentinel before or after the experts",
    sources=[
        "https://github.com/sgl-project/sglang/pull/15250",
        "https://github.com/sgl-project/sgl-kernel-xpu/pull/295",
    ],
)  # fmt: skip
def next_expert(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """The kernel that sorts tokens by expert counts from one: each token gets the expert after the one it chose."""
    return right_experts(ops, (*experts[1:], experts[0]), x, chosen)


# ---- input


def jittered(ops: Any, x: Any) -> Any:
    """x times random factors near 1, as stored. An enclosure holds all such factors. x: [T, D]"""
    if isinstance(x, Enclosure):
        some = np.full(x.shape, JITTER)
        factors: Any = Enclosure(np.ones(x.shape), some, some**2 / 3, accumulation=x.accumulation)
    else:
        factors = np.random.default_rng(len(x)).uniform(1 - JITTER, 1 + JITTER, x.shape)
    return rounded(x * factors, ops.policy.storage)


def moe_of_two(ops: Any, model: Any, layer: Any, routed: Any, x: Any) -> Any:
    """MOE-1 with a separate input for the router. routed, x: [T, D]   returns: [T, D]"""
    chosen, weights = model.steps.route(ops, routed, layer.router, model.config.experts_per_token)
    outputs = model.steps.run_experts(ops, layer.experts, x, chosen)
    return ops.tap("moe.output", model.steps.combine(ops, outputs, weights))


@mutant(
    "router-jitter-at-eval", breaks=["ROUTE-1", "MOE-1"], touches=["router.logits"], step="moe", by_size=True,
    fix="switch the router's noise off when not training", severity="medium",
    sources=[
        "https://github.com/hpcaitech/ColossalAI/pull/419",
        "https://github.com/vllm-project/vllm/pull/35499",
    ],
)  # fmt: skip
def noise_at_inference(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """The router's input is multiplied by the noise of training, up to one percent, at inference too."""
    return moe_of_two(ops, model, layer, jittered(ops, x), x)


@mutant(
    "router-jitter-leaks-to-experts", breaks=["ROUTE-1", "EXPERT-3"], step="moe", by_size=True,
    touches=["router.logits", "expert.gate", "expert.up"],
    fix="multiply a copy by the noise: in place, it reaches the experts", severity="low",
    sources=[
        "https://github.com/huggingface/transformers/issues/33969",
        "https://github.com/huggingface/transformers/pull/29865",
    ],
)  # fmt: skip
def noise_in_place(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """The router's noise is multiplied into the hidden state in place, so the experts read it too."""
    x = jittered(ops, x)
    return moe_of_two(ops, model, layer, x, x)


@mutant(
    "router-input-unnormalised", breaks=["ROUTE-1", "MOE-1"], touches=["router.logits"], step="decoder_layer",
    fix="give the router the normed hidden state, which the experts read", severity="medium",
)  # fmt: skip
def routed_by_residual(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """The router reads the residual, before its norm."""
    h, cache = attention_half(ops, model, layer, x, positions, cache)
    normed = norm(ops, model, "moe_norm", h, layer.moe_norm)
    return ops.tap("residual", h + moe_of_two(ops, model, layer, h, normed)), cache


# ---- met since: candidates

FIRST = 10
"""The candidates of the kernel: the threads of a block. In the known kernel there are 256."""


def choose_among(ops: Any, x: Any, router: Any, k: int, candidates: Any) -> tuple[Any, Any]:
    """ROUTE-1 to ROUTE-4 with a choice among some experts only. candidates: booleans [T, E]"""
    logits = logits_of(ops, x, router)
    experts = choose(ops, ops.where(candidates & np.ones(logits.shape, bool), logits, float("-inf")), k)
    return experts, ops.tap("router.weights", ops.weigh(read(ops, logits), experts))


@mutant(
    "router-first-experts-only", breaks=["ROUTE-2"], touches=["router.experts"], needs=["EXPERTS>10"], step="route",
    fix="let each thread of the kernel compare several experts", severity="critical",
    sources=["https://github.com/kekzl/imp/pull/2056"],
)  # fmt: skip
def within_a_block(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The kernel has one thread for each expert and a block has too few of them. The last experts are never chosen."""
    return choose_among(ops, x, router, k, np.arange(router.shape[0]) < FIRST)


@mutant(
    "router-sort-powers-of-two", breaks=["ROUTE-2"], touches=["router.experts"], step="route",
    fix="pad the logits to a power of two with -infinity before a bitonic sort",
    sources=["https://github.com/ggml-org/llama.cpp/issues/5213"],
)  # fmt: skip
def sorted_in_part(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The sort is right for powers of two only. Of another number of experts it sorts the largest power of two that
    fits, and never returns the others."""
    experts = router.shape[0]
    return choose_among(ops, x, router, k, np.arange(experts) < max(k, 1 << (experts.bit_length() - 1)))


@mutant(
    "router-negative-logits-lost", breaks=["ROUTE-2"], touches=["router.experts"], step="route",
    fix="start the search for the largest logit at -infinity, not at zero", severity="critical",
    sources=["https://github.com/flashinfer-ai/flashinfer/issues/2822"],
)  # fmt: skip
def largest_from_zero(ops: Any, x: Any, router: Any, k: int) -> tuple[Any, Any]:
    """The search for the largest logit starts at zero, so that a negative logit is never the largest. Where too few are
    positive, the experts with the lowest ids are chosen."""
    logits = logits_of(ops, x, router)
    positive = (logits.mid if isinstance(logits, Enclosure) else logits) > 0
    experts = choose(ops, ops.where(positive, logits, 0.0), k)
    return experts, ops.tap("router.weights", ops.weigh(read(ops, logits), experts))
