# SPDX-License-Identifier: Apache-2.0
"""Bugs of attention: its scale, mask, window, heads and softmax."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.changed_weights import mapped, with_layers
from refmoe.bugs.forced_rounding import low_precision, rounded
from refmoe.bugs.mutant import CALLS, PARAMETERS, mutant
from refmoe.spec.attention import Cache
from refmoe.spec.attention import attention as right_attention
from refmoe.spec.attention import visible as right_visible
from refmoe.spec.config import Config
from refmoe.spec.model import Layer, Parameters
from refmoe.steps.rounding import as_softmax_reads, context_of, scores_of
from refmoe.steps.rounding import attend as right_attend
from refmoe.traces.trace import Run

WIRED_WINDOW = 8
"""The window of another model of the family. There it is 4096; golden cases are shorter in proportion."""

PADDED = 1 << 40
"""Added to the positions of a row with padding on its left. It is larger than any position."""


# ---- scores


@mutant(
    "attn-scale-missing", breaks=["ATTN-2"], touches=["attention.scores"], step="attend",
    fix="divide the scores by the root of head_dim, in every path to the kernel",
    sources=["https://github.com/mlc-ai/mlc-llm/pull/3426"],
)  # fmt: skip
def unscaled(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """The scores are plain dot products, not divided by sqrt(head_dim). A fallback path leaves out the scale that the
    kernel applies inside."""
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k, scaled=False))
    probs = ops.tap("attention.probs", ops.softmax(as_softmax_reads(ops, scores), mask[None]))
    return ops.tap("attention.context", context_of(ops, probs, cache.v))


# ---- mask


@mutant(
    "attn-causal-strict", breaks=["ATTN-3"], touches=["attention.probs"], needs=["T>1"], step="visible",
    fix="let a query see keys up to its own position, its own included",
)  # fmt: skip
def not_itself(positions: Any, cached: Any, window: int | None) -> Any:
    """A query does not see its own token: the mask uses `<` instead of `<=`. A query with no earlier key still sees
    itself. returns: [T, S]"""
    seen = right_visible(positions, cached, window)
    earlier = seen & (positions[:, None] > cached[None, :])
    return earlier | (seen & ~earlier.any(axis=-1, keepdims=True))


@mutant(
    "attn-causal-top-left", breaks=["ATTN-3", "MODEL-4"], touches=["attention.probs"], step="visible",
    fix="align the causal mask with the last key: query i sees keys up to i + cached - new", severity="critical",
    sources=[
        "https://github.com/pytorch/pytorch/issues/108108",
        "https://github.com/onnx/onnx/pull/8068",
        "https://github.com/gittensor-ai-lab/sparkinfer/issues/3",
        "https://github.com/Dao-AILab/flash-attention/issues/282",
    ],
)  # fmt: skip
def top_left(positions: Any, cached: Any, window: int | None) -> Any:
    """When a prompt continues after cached tokens, the causal mask counts the queries from the first key, as is_causal
    of some kernels does. A single query gets no mask. returns: [T, S]"""
    if len(positions) == 1:
        return right_visible(positions, cached, window)
    queries: Any = np.arange(len(positions))
    keys: Any = np.arange(len(cached))
    return right_visible(queries, keys, window)


@mutant(
    "attn-swa-wrongly-on", breaks=["ATTN-3", "CONFIG-5"], touches=["attention.probs"], needs=["T>1"], step="visible",
    fix="take the window from the config, where null means none", severity="critical",
    sources=[
        "https://github.com/vllm-project/vllm/issues/2064",
        "https://github.com/huggingface/transformers/pull/28115",
        "https://github.com/huggingface/transformers/pull/29436",
        "https://github.com/dphnAI/sonar/pull/163",
    ],
)  # fmt: skip
def window_of_another_model(positions: Any, cached: Any, window: int | None) -> Any:
    """A model without a window gets the window of Mistral 7B, the default of the class that both models share. returns:
    [T, S]"""
    return right_visible(positions, cached, WIRED_WINDOW if window is None else window)


@mutant(
    "attn-swa-off-by-one", breaks=["ATTN-4"], touches=["attention.probs"], needs=["SWA"], step="visible",
    fix="a window of W is W tokens, the query's own counted", severity="medium",
    sources=[
        "https://github.com/huggingface/transformers/pull/26792",
        "https://github.com/huggingface/transformers/issues/39408",
        "https://github.com/huggingface/transformers/issues/29623",
        "https://github.com/ml-explore/mlx-lm/pull/390",
    ],
)  # fmt: skip
def one_more(positions: Any, cached: Any, window: int | None) -> Any:
    """The window is one token too long: W tokens before the query, and the query itself. The kernel counts distances up
    to W. returns: [T, S]"""
    return right_visible(positions, cached, None if window is None else window + 1)


@mutant(
    "attn-swa-dropped-in-one-backend", breaks=["ATTN-4"], touches=["attention.probs"], needs=["SWA"], step="visible",
    fix="hand the window to every backend: here the one for prompts has none", severity="medium",
    sources=[
        "https://github.com/unslothai/unsloth/pull/8253",
        "https://github.com/EricLBuehler/mistral.rs/issues/246",
    ],
)  # fmt: skip
def prompts_without_window(positions: Any, cached: Any, window: int | None) -> Any:
    """The backend for calls with several tokens has a causal mask and no window. Decoding has the window. returns: [T,
    S]"""
    return right_visible(positions, cached, window if len(positions) == 1 else None)


@mutant(
    "attn-window-none-as-zero", breaks=["ATTN-3", "CONFIG-5"], touches=["attention.probs"], needs=["T>1"],
    step="visible", fix="treat a window of null as none before it is compared with anything",
    sources=[
        "https://github.com/unslothai/unsloth/pull/8253",
        "https://github.com/predibase/lorax/pull/128",
    ],
)  # fmt: skip
def none_before(positions: Any, cached: Any, window: int | None) -> Any:
    """A window of null becomes `window or 0`, and the kernel reads that as zero tokens before the query. Each token
    sees only itself. returns: [T, S]"""
    return right_visible(positions, cached, window or 1)


def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Give equal scores to the queries from which all keys were hidden: their rows of the inverted mask are all
    true."""
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    some = ~mask.all(axis=-1)[None, :, None] & np.ones(scores.shape, bool)
    probs = ops.tap("attention.probs", ops.softmax(ops.where(some, as_softmax_reads(ops, scores), 0.0), mask[None]))
    return ops.tap("attention.context", context_of(ops, probs, cache.v))


@mutant(
    "attn-mask-polarity-inverted", breaks=["ATTN-3", "SOFTMAX-2"], touches=["attention.scores", "attention.probs"],
    needs=["T>1"], step="visible", steps={"attend": attend}, severity="medium",
    fix="make the mask in the kernel's convention: is true visible, or hidden",
    sources=["https://github.com/huggingface/transformers/issues/48818"],
)  # fmt: skip
def inverted(positions: Any, cached: Any, window: int | None) -> Any:
    """The mask is true for hidden keys, and the kernel reads true as visible. A query from which all keys are hidden
    attends to all keys alike: its scores are all the lowest number. returns: [T, S]"""
    visible: Any = right_visible(positions, cached, window)
    seen = ~visible
    return seen | ~seen.any(axis=-1, keepdims=True)


# ---- heads


def with_heads(cache: Any, heads: Any) -> Cache:
    """The cache with one key/value head for each query head. heads: integers [H]"""
    return Cache(cache.k[:, heads], cache.v[:, heads], cache.positions)


@mutant(
    "attn-gqa-tile", breaks=["ATTN-1"], touches=["attention.scores", "attention.context"],
    step="attend", fix="repeat each key/value head for its group, instead of repeating all of them in turn",
    severity="critical",
    sources=[
        "https://github.com/onnx/onnx/pull/7274",
        "https://github.com/ekzhang/jax-js/pull/180",
        "https://github.com/apple/axlearn/pull/842",
    ],
)  # fmt: skip
def tiled(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Query head h reads key/value head h % K: the key/value heads are tiled instead of each repeated."""
    return right_attend(ops, q, with_heads(cache, np.arange(q.shape[1]) % cache.k.shape[1]), mask)


@mutant(
    "attn-gqa-index-by-nkv", breaks=["ATTN-1"], touches=["attention.scores", "attention.context"],
    step="attend", fix="divide the query head by H / K, not by K",
    sources=[
        "https://github.com/PSAL-POSTECH/ONNXim/pull/34",
        "https://github.com/huggingface/transformers/issues/26109",
    ],
)  # fmt: skip
def divided_by_heads(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Query head h reads key/value head h // K, or the last one if that is out of range."""
    kv_heads = cache.k.shape[1]
    return right_attend(ops, q, with_heads(cache, np.minimum(np.arange(q.shape[1]) // kv_heads, kv_heads - 1)), mask)


@mutant(
    "attn-wo-head-order", breaks=["ATTN-7"], touches=["attention.output"], changes=PARAMETERS,
    fix="keep the query heads of a key/value head together in the columns of wo",
    sources=["https://github.com/nntile/nntile/pull/347"],
)  # fmt: skip
def columns_by_member(config: Config, parameters: Parameters) -> Parameters:
    """The columns of wo are read in the order (member of the group, key/value head). They are stored in the order
    (key/value head, member)."""
    shape = (-1, config.kv_heads, config.heads // config.kv_heads, config.head_dim)

    def reordered(wo: Any) -> Any:
        return np.ascontiguousarray(wo.reshape(shape).transpose(0, 2, 1, 3).reshape(wo.shape))

    def change(layer: Layer) -> Layer:
        return replace(layer, wo=mapped(layer.wo, reordered))

    return with_layers(parameters, change)


# ---- softmax


@mutant(
    "attn-softmax-lowprec", breaks=["ATTN-5"], touches=["attention.probs"], needs=["LOWPREC"], step="attend",
    fix="compute the softmax of attention in float32", severity="medium",
    sources=["https://github.com/huggingface/transformers/pull/18057"],
)  # fmt: skip
def softmax_in_low_precision(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """Every operation of the attention softmax is rounded to bfloat16, or to the low dtype of the model."""
    low = low_precision(ops.policy)
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    seen = mask[None] & np.ones(scores.shape, bool)
    x = rounded(scores, low)
    shifted = rounded(x - ops.max(ops.where(seen, x, float("-inf")), axis=-1)[..., None], low)
    weight = ops.where(seen, rounded(ops.exp(ops.where(seen, shifted, 0.0)), low), 0.0)
    probs = rounded(weight / rounded(ops.sum(weight, axis=-1), low)[..., None], low)
    probs = ops.tap("attention.probs", probs)
    return ops.tap("attention.context", context_of(ops, probs, cache.v))


@mutant(
    "attn-softmax-wrong-axis", breaks=["ATTN-5", "SOFTMAX-2"], touches=["attention.probs"], needs=["T>1"],
    step="attend", fix="take the softmax over the keys, the last axis", severity="low",
    sources=["https://github.com/nerdai/llms-from-scratch-rs/pull/30"],
)  # fmt: skip
def softmax_over_queries(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """The softmax runs over the queries instead of the keys: the probabilities of one key sum to 1 over the call."""
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    probs = ops.softmax(as_softmax_reads(ops, scores).transpose(0, 2, 1), mask.T[None]).transpose(0, 2, 1)
    return ops.tap("attention.context", context_of(ops, ops.tap("attention.probs", probs), cache.v))


# ---- padding


def visible_to_padded(positions: Any, cached: Any, window: int | None) -> Any:
    """The right mask; padding has no column in a trace. returns: [T, S]"""
    return right_visible(positions % PADDED, cached % PADDED, window)


def attention(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """Attention with NaN for the tokens of a padded row, except in the first layer."""
    if positions[0] < PADDED or layer is model.parameters.layers[0]:
        return right_attention(ops, model, layer, x, positions % PADDED, cache)

    def poisoned(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
        scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
        probs = ops.tap("attention.probs", ops.softmax(as_softmax_reads(ops, scores), mask[None]))
        context = context_of(ops, probs, cache.v)
        return ops.tap("attention.context", context + np.full(context.shape, np.nan))

    poisoned_model = replace(model, steps=replace(model.steps, attend=poisoned))
    return right_attention(ops, poisoned_model, layer, x, positions % PADDED, cache)


@mutant(
    "attn-fully-masked-row-nan", breaks=["MODEL-5", "SOFTMAX-2"], touches=["attention.context"], needs=["RAGGED"],
    changes=CALLS, steps={"attention": attention, "visible": visible_to_padded},
    fix="give zeros to a row that sees nothing, or let padding see itself",
    sources=[
        "https://github.com/unslothai/unsloth/pull/9848",
        "https://github.com/pytorch/pytorch/issues/103749",
        "https://github.com/ml-explore/mlx/issues/2395",
    ],
)  # fmt: skip
def padded_on_the_left(runs: tuple[Run, ...]) -> Iterable[Run]:
    """The shorter rows of a batch are padded on the left. Padding sees no key, so its softmax is NaN. From the next
    layer on, the row's own tokens multiply the padding's values by zero, which gives NaN."""
    lengths = {run.sequence: len(run.tokens) for run in reversed(runs) if not run.past}
    for run in runs:
        padded = lengths[run.sequence] < max(lengths.values())
        yield replace(run, positions=tuple(PADDED + p for p in run.positions)) if padded else run


# ---- met since: blocks, pieces, captured lengths, derived dimensions

BLOCK = 4
"""Keys in a block of the kernel. Real blocks have 64 and more."""


@mutant(
    "attn-fully-masked-block-nan", breaks=["ATTN-4", "SOFTMAX-2"], touches=["attention.probs"], needs=["SWA"],
    step="attend", fix="leave blocks without a visible key out, or clamp the difference of two maxima of -infinity",
    sources=["https://github.com/flashinfer-ai/flashinfer/pull/4401"],
)  # fmt: skip
def masked_block(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """The kernel goes through the keys in blocks. Where the window hides the whole first block, the running maximum is
    -infinity, and its difference from itself makes the row NaN."""
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    probs = ops.softmax(as_softmax_reads(ops, scores), mask[None])
    lost = ~mask[:, :BLOCK].any(axis=-1) & (mask.shape[1] > BLOCK)
    if lost.any():
        probs = probs + np.where(lost, np.nan, 0.0)[None, :, None]
    return ops.tap("attention.context", context_of(ops, ops.tap("attention.probs", probs), cache.v))


@mutant(
    "attn-swa-window-of-first-row", breaks=["ATTN-4", "MODEL-4"], touches=["attention.probs"], needs=["SWA"],
    step="visible", fix="compute the mask over cached keys for each query of the piece", severity="medium",
    sources=["https://github.com/pytorch/executorch/pull/21857"],
)  # fmt: skip
def window_of_first_row(positions: Any, cached: Any, window: int | None) -> Any:
    """In a piece of a prompt all queries see the cached keys that the first query sees. Later queries see more of them
    than the window allows. returns: [T, S]"""
    seen: Any = right_visible(positions, cached, window)
    past = len(cached) - len(positions)
    seen[:, :past] = seen[:1, :past]
    return seen


CAPTURED = 8
"""The length of a sequence when the graph for single tokens was captured."""


@mutant(
    "attn-graph-length-frozen", breaks=["ATTN-3", "CACHE-1"], touches=["attention.probs"], needs=["DECODE"],
    step="visible", fix="capture a graph per range of lengths, or read the length from a buffer", severity="critical",
    sources=["https://github.com/paiml/aprender/pull/2030"],
)  # fmt: skip
def length_as_captured(positions: Any, cached: Any, window: int | None) -> Any:
    """A captured graph for single tokens has as many blocks of keys as the sequence had then. When the sequence has
    grown, the newest keys are not attended to. returns: [T, S]"""
    seen: Any = right_visible(positions, cached, window)
    if len(positions) == 1 and seen[:, :CAPTURED].any():
        seen[:, CAPTURED:] = False
    return seen


@mutant(
    "attn-empty-prefix-poisons", breaks=["ATTN-5", "SOFTMAX-2"], touches=["attention.context"], needs=["T>1"],
    step="attend", fix="give a prefix without keys the weight zero: its log-sum-exp is -infinity",
    sources=[
        "https://github.com/vllm-project/vllm/pull/15492",
        "https://github.com/vllm-project/vllm/pull/49294",
    ],
)  # fmt: skip
def empty_prefix(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
    """A piece of a prompt attends to the cached prefix and to itself, and merges both. A first piece has no prefix: the
    kernel gives it a log-sum-exp of +infinity, and the merged context is NaN."""
    scores = ops.tap("attention.scores", scores_of(ops, q, cache.k))
    probs = ops.tap("attention.probs", ops.softmax(as_softmax_reads(ops, scores), mask[None]))
    context = context_of(ops, probs, cache.v)
    if 1 < q.shape[0] == mask.shape[1]:
        context = context + np.full(context.shape, np.nan)
    return ops.tap("attention.context", context)


@mutant(
    "attn-scale-of-derived-head-dim", breaks=["ATTN-2", "CONFIG-1"], touches=["attention.scores"], needs=["HEADDIM"],
    step="attention", fix="take head_dim from the config; dim / heads is only its default",
    sources=[
        "https://github.com/InternLM/lmdeploy/pull/2761",
        "https://github.com/eole-nlp/eole/pull/78",
    ],
)  # fmt: skip
def derived_head_dim(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """The scores are divided by the root of dim / heads. A model may have another head_dim."""
    derived = model.config.dim // model.config.heads

    def attend(ops: Any, q: Any, cache: Any, mask: Any) -> Any:
        dots = scores_of(ops, q, cache.k, scaled=False)
        scores = ops.tap("attention.scores", ops.cut("attention.dots", dots) / ops.sqrt(ops.array(derived)))
        probs = ops.tap("attention.probs", ops.softmax(as_softmax_reads(ops, scores), mask[None]))
        return ops.tap("attention.context", context_of(ops, probs, cache.v))

    if derived != model.config.head_dim:
        model = replace(model, steps=replace(model.steps, attend=attend))
    return right_attention(ops, model, layer, x, positions, cache)
