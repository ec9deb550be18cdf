# SPDX-License-Identifier: Apache-2.0
"""Bugs of the experts: their computation, the rows that each one gets, and the sum of their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.bugs.changed_weights import mapped, with_experts, with_layers
from refmoe.bugs.forced_rounding import rounded
from refmoe.bugs.mutant import PARAMETERS, mutant
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.steps.rounding import run_experts as right_experts

EXPERTS = ("expert.gate", "expert.up", "expert.output")
"""The taps that an expert's weights compute."""
READ = ("expert.gate", "expert.up")
"""The taps that an expert computes from its input."""

TILE = 32
"""Tokens in a tile. The known kernel was right only for this number of tokens."""
ALIGN = 8
"""Rows that the kernel gives an expert without tokens: the rows of a tensor core's tile."""
ROWS = 100
"""Rows after which an offset wraps. In 8x7B these are 2^31 / 28672 = 74898 rows, 37449 tokens; no case is so long."""

SLOPE = 0.001
"""A bound on the slope of the difference between both forms of GELU."""
ROUNDINGS = 4
"""Roundings of 1 + tanh(z) or 1 + erf(z): of the function, the sum and the products."""


def swiglu(ops: Any, gate: Any, up: Any) -> Any:
    """EXPERT-2, with its cut points. gate, up: [T, k, F]   returns: [T, k, F]"""
    return ops.silu(gate) * up


def project(ops: Any, experts: Any, rows: Any, ids: Any, name: str) -> Any:
    """The product of each row with the matrix `name` of its expert. rows: [n, m]   ids: integers [n]   returns:
    [n, p]"""
    order, counts = ops.group(ids, len(experts))
    rows, results, start = rows[order], [], 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            results.append(ops.linear(rows[start : start + count], getattr(expert, name)))
            start += count
    return ops.placed(results, order)


def run_rows(ops: Any, experts: Any, rows: Any, chosen: Any, hidden_of: Callable[[Any, Any, Any], Any] = swiglu) -> Any:
    """`refmoe.spec.experts.run_experts` with a row of its own for each slot.

    rows: [T k, D]   chosen: integers [T, k]   returns: [T, k, D]
    """
    ids, slots = chosen.reshape(-1), (*chosen.shape, -1)
    gate = ops.tap("expert.gate", project(ops, experts, rows, ids, "w1").reshape(slots))
    up = ops.tap("expert.up", project(ops, experts, rows, ids, "w3").reshape(slots))
    hidden = ops.tap("expert.hidden", hidden_of(ops, gate, up))
    return ops.tap("expert.output", project(ops, experts, hidden.reshape(len(ids), -1), ids, "w2").reshape(slots))


def slots_of(x: Any, chosen: Any) -> Any:
    """The row that each slot reads. x: [T, D]   chosen: integers [T, k]   returns: [T k, D]"""
    return x[np.repeat(np.arange(len(chosen)), chosen.shape[1])]


def routed(ops: Any, model: Any, layer: Any, x: Any) -> tuple[Any, Any]:
    """The expert ids [T, k] and weights [T, k] of the right router."""
    chosen, weights = model.steps.route(ops, x, layer.router, model.config.experts_per_token)
    return chosen, weights


def weighted_outputs(ops: Any, model: Any, layer: Any, x: Any) -> tuple[Any, Any]:
    """The expert ids [T, k], and the outputs of the experts times their weights [T, k, D]."""
    chosen, weights = routed(ops, model, layer, x)
    outputs = model.steps.run_experts(ops, layer.experts, x, chosen)
    return chosen, ops.cut("combine.weighted", outputs * weights[:, :, None])


# ---- what an expert computes


@mutant(
    "expert-w1-w3-swapped", breaks=["EXPERT-2"], touches=["expert.hidden"], step="run_experts",
    fix="apply silu to w1's half of the fused projection, and multiply by w3's", severity="critical",
    sources=[
        "https://github.com/ml-explore/mlx-lm/pull/767",
        "https://github.com/TransformerLensOrg/TransformerLens/pull/1668",
        "https://github.com/vllm-project/vllm/pull/31504",
        "https://github.com/vllm-project/vllm/pull/40082",
        "https://github.com/flashinfer-ai/flashinfer/pull/5291",
    ],
)  # fmt: skip
def silu_of_up(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """The halves of the fused projection are read in the wrong order: silu is applied to the up projection, which then
    multiplies the gate."""
    return run_rows(ops, experts, slots_of(x, chosen), chosen, lambda ops, gate, up: swiglu(ops, up, gate))


@mutant(
    "expert-gelu", breaks=["EXPERT-2"], touches=["expert.hidden"], step="run_experts",
    fix="take the activation from hidden_act, which is silu",
    sources=[
        "https://github.com/huggingface/candle/pull/991",
        "https://github.com/FastCrest/tether/pull/241",
    ],
)  # fmt: skip
def gelu_gate(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """The activation is GELU, copied from another model. The simulation uses its tanh form and accepts the erf form in
    a trace."""

    def geglu(ops: Any, gate: Any, up: Any) -> Any:
        # (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks and Gimpel 2016
        twice = (gate + gate * gate * gate * 0.044715) * (2 * math.sqrt(2 / math.pi))
        return ops.cut("expert.silu", of_either_form(gate, gate * ops.sigmoid(twice))) * up

    return run_rows(ops, experts, slots_of(x, chosen), chosen, geglu)


def of_either_form(gate: Any, gelu: Any) -> Any:
    """An enclosure that holds both forms of GELU: the tanh form, and x (1 + erf(x / sqrt(2))) / 2.

    Below zero, 1 + tanh or 1 + erf loses a few roundings of 1, which the sigmoid does not.
    gate: its input   gelu: the tanh form, of the same shape
    """
    if not isinstance(gelu, Enclosure):
        return gelu
    gelu, x = gelu.settle(), gate.mid
    other = x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2
    apart = np.abs(other - gelu.mid) + SLOPE * gate.r + ROUNDINGS * gelu.accumulation.u * np.abs(x)
    return Enclosure(gelu.mid, gelu.r + apart, gelu.v + apart**2, accumulation=gelu.accumulation)


@mutant(
    "expert-w2-transposed", breaks=["EXPERT-1"], touches=["expert.output"], needs=["LOAD"], changes=PARAMETERS,
    fix="transpose w2 when it is cut from the stack [E F, D]; a reshape to [D, F] is not that",
    sources=[
        "https://github.com/huggingface/transformers/pull/27942",
        "https://github.com/intel/ipex-llm/pull/9930",
        "https://github.com/ServiceNow/Fast-LLM/pull/365",
    ],
)  # fmt: skip
def down_reshaped(config: Config, parameters: Parameters) -> Parameters:
    """An expert's part of the stacked w2 is reshaped to the shape of w2. It should be transposed."""

    def reshaped(expert: Any) -> Any:
        return replace(expert, w2=mapped(expert.w2, lambda down: down.T.reshape(down.shape)))

    return with_experts(parameters, reshaped)


@mutant(
    "expert-index-permuted", breaks=["EXPERT-3"], touches=EXPERTS, needs=["LOAD", "EXPERTS>10"], changes=PARAMETERS,
    fix="sort the experts' keys by number",
)  # fmt: skip
def experts_by_name(config: Config, parameters: Parameters) -> Parameters:
    """Experts are loaded in the alphabetical order of their keys: 0, 1, 10, 11, 2, ..."""
    order = sorted(range(config.experts), key=str)
    return with_layers(parameters, lambda layer: replace(layer, experts=tuple(layer.experts[e] for e in order)))


# ---- which rows an expert gets


@mutant(
    "expert-only-first-token", breaks=["EXPERT-3"], touches=READ, needs=["T>1"], step="run_experts",
    fix="look at the list of tokens of each expert: it ends after the first", severity="critical",
    sources=["https://github.com/vllm-project/vllm-xpu-kernels/issues/453"],
)  # fmt: skip
def first_of_each(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """Each expert computes only the first token of its list. The rows of its other tokens stay zeros."""
    ids = chosen.reshape(-1)
    first = np.zeros(len(ids))
    first[np.unique(ids, return_index=True)[1]] = 1.0
    return run_rows(ops, experts, slots_of(x, chosen) * first[:, None], chosen)


@mutant(
    "expert-token-index-drift", breaks=["EXPERT-3"], touches=READ, needs=["T>1"], step="run_experts",
    fix="check the list of token indices where the number of tokens is no multiple of the tile",
    sources=["https://github.com/tenstorrent/tt-metal/issues/50669"],
)  # fmt: skip
def next_token(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """Unless the tokens fill whole tiles, the index lists of all experts but the first are off by one: they name the
    next token."""
    tokens, k = chosen.shape
    own = np.repeat(np.arange(tokens), k)
    drifts = (chosen.reshape(-1) > 0) * (tokens % TILE > 0)
    return run_rows(ops, experts, x[(own + drifts) % tokens], chosen)


@mutant(
    "expert-empty-offset-shift", breaks=["EXPERT-3"], touches=READ, needs=["T>1", "EMPTY"], step="run_experts",
    fix="sum the group sizes with the rows that empty experts are given", severity="medium",
    sources=[
        "https://github.com/pytorch/torchtitan/issues/1237",
        "https://github.com/pytorch/torchtitan/pull/1166",
        "https://github.com/ModelTC/LightLLM/pull/1369",
    ],
)  # fmt: skip
def offsets_without_padding(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """The grouped product gives an expert without tokens a block of padding rows, but the offsets do not count these
    rows. The following experts read rows that lie too early. A single token takes another path."""
    if len(chosen) == 1:
        return right_experts(ops, experts, x, chosen)
    ids = chosen.reshape(-1)
    order, counts = ops.group(ids, len(experts))
    rows, buffer, start = slots_of(x, chosen), [], 0
    padding = np.full(ALIGN, len(ids))  # the index of a row of zeros
    for count in counts:
        buffer.append(order[start : start + count] if count else padding)
        start += count
    found = np.concatenate(buffer)[: len(ids)][ops.inverse(order)]
    zeros = rows[:1] * np.zeros(1)
    return run_rows(ops, experts, ops.concatenate([rows, zeros])[found], chosen)


@mutant(
    "expert-int32-index-overflow", breaks=["EXPERT-2", "EXPERT-3"], touches=["expert.hidden"], needs=["LONG-ROW"],
    step="run_experts", fix="compute row offsets in 64 bits", severity="medium",
    sources=[
        "https://github.com/sgl-project/sglang/pull/4727",
        "https://github.com/vllm-project/vllm/pull/34279",
    ],
)  # fmt: skip
def offset_wraps(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """The 32-bit offset into the buffer of gates and ups wraps: rows past 2^31 elements read the first rows."""

    def wrapped(ops: Any, gate: Any, up: Any) -> Any:
        order, _ = ops.group(chosen.reshape(-1), len(experts))
        there = order[np.arange(len(order)) % ROWS][ops.inverse(order)]
        gate, up = (part.reshape(len(order), -1)[there].reshape(gate.shape) for part in (gate, up))
        return swiglu(ops, gate, up)

    return run_rows(ops, experts, slots_of(x, chosen), chosen, wrapped)


# ---- weights


@mutant(
    "expert-weight-on-input", breaks=["COMBINE-1"], touches=[*READ, "moe.output"], step="moe",
    fix="multiply the expert's output by its weight, not its input",
    sources=[
        "https://github.com/vllm-project/vllm/pull/16744",
        "https://github.com/NVIDIA/TensorRT-LLM/pull/3492",
    ],
)  # fmt: skip
def weight_before_expert(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """The weight multiplies the input of the expert, as in another model, instead of its output."""
    chosen, weights = routed(ops, model, layer, x)
    rows = rounded(slots_of(x, chosen) * weights.reshape(-1)[:, None], ops.policy.storage)
    return ops.tap("moe.output", ops.accumulate(run_rows(ops, layer.experts, rows, chosen), axis=1))


@mutant(
    "expert-weight-before-w2", breaks=["EXPERT-2", "COMBINE-1"], touches=["expert.hidden", "moe.output"], step="moe",
    fix="multiply by the weight after w2, or in float32 before it; by exact arithmetic it is the same", severity="low",
    sources=["https://github.com/radixark/Megatron-LM/pull/79"],
)  # fmt: skip
def weight_on_activation(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """The stored activation is multiplied by the weight before w2, and stored again. The result is the same except for
    rounding, but expert.hidden and expert.output hold other values."""
    chosen, weights = routed(ops, model, layer, x)

    def weighted(ops: Any, gate: Any, up: Any) -> Any:
        return ops.cut("expert.hidden", swiglu(ops, gate, up)) * weights[:, :, None]

    outputs = run_rows(ops, layer.experts, slots_of(x, chosen), chosen, weighted)
    return ops.tap("moe.output", ops.accumulate(outputs, axis=1))


@mutant(
    "expert-weight-missing", breaks=["COMBINE-1"], touches=["moe.output"], step="combine",
    fix="multiply each output by its weight before the sum",
    sources=[
        "https://github.com/vllm-project/vllm-xpu-kernels/pull/66",
        "https://github.com/kyegomez/Mixture-of-Depths/issues/1",
    ],
)  # fmt: skip
def sum_of_outputs(ops: Any, outputs: Any, weights: Any) -> Any:
    """The outputs of the experts are added without their weights: the kernel leaves out the multiplication."""
    return ops.accumulate(outputs, axis=1)


@mutant(
    "expert-weight-rank0-for-all", breaks=["COMBINE-1"], touches=["moe.output"], step="combine",
    fix="check the stride of the weights: each slot has its own", severity="medium",
    sources=["https://github.com/vllm-project/vllm-xpu-kernels/pull/66"],
)  # fmt: skip
def weight_of_first(ops: Any, outputs: Any, weights: Any) -> Any:
    """All slots of a token use the weight of its first choice: the kernel strides over the weights by tokens."""
    return ops.accumulate(ops.cut("combine.weighted", outputs * weights[:, :1][:, :, None]), axis=1)


# ---- how the outputs come back


@mutant(
    "expert-scatter-overwrite", breaks=["COMBINE-1"], touches=["moe.output"], step="moe",
    fix="add to the token's row instead of assigning it", severity="critical",
    sources=[
        "https://github.com/AviSoori1x/makeMoE/issues/2",
        "https://github.com/torch-spyre/torch-spyre/issues/3638",
        "https://github.com/deepseek-ai/DeepSeek-V3/issues/942",
    ],
)  # fmt: skip
def last_expert_wins(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """A loop over the experts assigns to a token's row instead of adding to it. Only the chosen expert with the highest
    id remains."""
    chosen, weighted = weighted_outputs(ops, model, layer, x)
    return ops.tap("moe.output", weighted[np.arange(len(chosen)), chosen.argmax(axis=1)])


@mutant(
    "expert-unpermute-missing", breaks=["COMBINE-1", "EXPERT-3"], touches=["moe.output"], needs=["T>1"], step="moe",
    fix="put the rows back in the order of tokens before they are summed",
)  # fmt: skip
def left_in_expert_order(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """The weighted rows are sorted by expert and summed in groups of k. They are never put back in the order of
    tokens."""
    chosen, weighted = weighted_outputs(ops, model, layer, x)
    order, _ = ops.group(chosen.reshape(-1), len(layer.experts))
    rows = weighted.reshape(len(order), -1)[order].reshape(weighted.shape)
    return ops.tap("moe.output", ops.accumulate(rows, axis=1))


@mutant(
    "expert-empty-uninitialised", breaks=["EXPERT-3", "COMBINE-1"], touches=["moe.output"], needs=["POISON"],
    fix="leave out the rows of experts without tokens, or clear them: a product with zero does not", severity="medium",
    step="moe",
    sources=[
        "https://github.com/meta-pytorch/MSLK/pull/158",
        "https://github.com/huggingface/transformers/pull/45621",
    ],
)  # fmt: skip
def zero_times_garbage(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """Every token adds the output of every expert, with weight zero for experts that it did not choose. The buffer of
    an expert without tokens is never cleared; here it is full of NaN."""
    chosen, weights = routed(ops, model, layer, x)
    outputs = model.steps.run_experts(ops, layer.experts, x, chosen)
    y = model.steps.combine(ops, outputs, weights)
    if len(np.unique(chosen)) < model.config.experts:
        y = y + np.full(y.shape, np.nan)
    return ops.tap("moe.output", y)


# ---- met since: frozen buffers, copies of experts, padding, limits, capacity


@mutant(
    "expert-graph-reads-frozen-buffer", breaks=["MOE-1", "MODEL-4"], touches=READ, needs=["DECODE"],
    step="run_experts", fix="copy the hidden state into the buffer that the captured graph reads, before each replay",
    severity="critical", sources=["https://github.com/vllm-project/vllm/pull/52383"],
)  # fmt: skip
def frozen_input(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """A call with one token replays a captured graph whose experts read a buffer that nobody fills: zeros. The router
    reads the live hidden state, and prompts take another path."""
    return right_experts(ops, experts, x * 0.0 if len(chosen) == 1 else x, chosen)


@mutant(
    "expert-replica-summed-twice", breaks=["COMBINE-1", "SHARD-11"], touches=["moe.output"], step="moe",
    fix="run each token of a replicated expert on one of the ranks that hold it", severity="critical",
    sources=["https://github.com/sgl-project/sglang/pull/32962"],
)  # fmt: skip
def both_copies_add(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """The first expert is replicated on two ranks to balance their load. Both compute its tokens, and the sum over the
    ranks holds its output twice."""
    chosen, weighted = weighted_outputs(ops, model, layer, x)
    copies = np.where(chosen == 0, 2.0, 1.0)[:, :, None]
    return ops.tap("moe.output", ops.accumulate(weighted * copies, axis=1))


@mutant(
    "expert-weights-of-first-token", breaks=["COMBINE-1", "MODEL-4"], touches=["moe.output"], needs=["T>1"],
    step="combine", fix="advance the pointer to the weights by a row for each token", severity="critical",
    sources=["https://github.com/ggml-org/llama.cpp/pull/17032"],
)  # fmt: skip
def weights_of_row_zero(ops: Any, outputs: Any, weights: Any) -> Any:
    """The fused reduction was written for one token: it weights the outputs of every token with the weights of the
    first."""
    return ops.accumulate(ops.cut("combine.weighted", outputs * weights[:1, :, None]), axis=1)


@mutant(
    "expert-rows-of-ranks-exchanged", breaks=["SHARD-11", "MODEL-4"], touches=["moe.output"], needs=["T>1"],
    step="combine", fix="undo gather and scatter of the token rows in the reverse order", severity="critical",
    sources=[
        "https://github.com/vllm-project/vllm-ascend/pull/11921",
        "https://github.com/sgl-project/sglang/pull/28216",
    ],
)  # fmt: skip
def halves_exchanged(ops: Any, outputs: Any, weights: Any) -> Any:
    """Each of two ranks gives half of the tokens to the experts. The rows come back in the order of another
    collective, so that each rank continues with the rows of the other."""
    y = ops.accumulate(ops.cut("combine.weighted", outputs * weights[:, :, None]), axis=1)
    tokens = y.shape[0]
    return y[(np.arange(tokens) + tokens // 2) % tokens]


PAD = 32
"""The multiple to which the kernel pads the hidden size of an expert."""


@mutant(
    "expert-padding-not-zero", breaks=["EXPERT-1"], touches=["expert.output"], changes=PARAMETERS,
    fix="fill the padding of the hidden size with zeros: in the weights, and in the activation",
    sources=["https://github.com/ROCm/aiter/issues/5413"],
)  # fmt: skip
def padding_repeats(config: Config, parameters: Parameters) -> Parameters:
    """The hidden size is padded to the tile of the kernel and the padding is never cleared. It holds the beginning of
    the row, which each output then counts twice."""
    extra = min(-config.hidden_dim % PAD, config.hidden_dim)

    def padded(down: Any) -> Any:
        twice = down.copy()
        twice[:, :extra] += down[:, :extra]
        return twice

    if not extra:
        return parameters
    return with_experts(parameters, lambda expert: replace(expert, w2=mapped(expert.w2, padded)))


STEP_OF_SUM = 8
"""Terms that the kernel adds at a time. Real kernels add 32 to 128; golden cases have short sums."""


@mutant(
    "expert-reduction-tail-lost", breaks=["EXPERT-1"], touches=["expert.output"], changes=PARAMETERS,
    fix="round the number of steps of the reduction up, and mask the last one",
    sources=["https://github.com/AI-Hypercomputer/maxtext/issues/1183"],
)  # fmt: skip
def tail_lost(config: Config, parameters: Parameters) -> Parameters:
    """The grouped product adds whole tiles of the hidden size. Terms after the last whole tile are lost."""
    whole = config.hidden_dim // STEP_OF_SUM * STEP_OF_SUM

    def shortened(down: Any) -> Any:
        kept = down.copy()
        kept[:, whole:] = 0
        return kept

    if whole in (0, config.hidden_dim):
        return parameters
    return with_experts(parameters, lambda expert: replace(expert, w2=mapped(expert.w2, shortened)))


@mutant(
    "expert-swiglu-limit-default-zero", breaks=["EXPERT-2"], touches=["expert.hidden"], step="run_experts",
    fix="let the default of the clamp be infinity: a model without a limit has none",
    sources=["https://github.com/microsoft/onnxruntime/pull/27221"],
)  # fmt: skip
def clamped_to_zero(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """The activation is clamped to a limit that some models have. A model without one gets the default, which is 0, and
    every hidden activation is 0."""
    return run_rows(ops, experts, slots_of(x, chosen), chosen, lambda ops, gate, up: swiglu(ops, gate, up) * 0.0)


@mutant(
    "expert-capacity-drops-tokens", breaks=["COMBINE-1", "EXPERT-3", "MODEL-4"], touches=["moe.output"], needs=["T>1"],
    step="moe", fix="switch the capacity of experts off at inference", severity="medium",
    sources=["https://github.com/microsoft/Tutel/issues/230"],
)  # fmt: skip
def over_capacity(ops: Any, model: Any, layer: Any, x: Any) -> Any:
    """Each expert takes its even share of the tokens, as in training. Tokens beyond that are dropped: their slots add
    nothing, so the result depends on the other tokens of the call."""
    chosen, weighted = weighted_outputs(ops, model, layer, x)
    capacity = -(-chosen.size // model.config.experts)
    order = chosen.T.reshape(-1)  # first choices before second ones
    place = np.zeros(order.size, int)
    for expert in np.unique(order):
        place[order == expert] = np.arange((order == expert).sum())
    kept = (place < capacity).reshape(chosen.shape[::-1]).T
    return ops.tap("moe.output", ops.accumulate(ops.where(kept[:, :, None], weighted, 0.0), axis=1))
