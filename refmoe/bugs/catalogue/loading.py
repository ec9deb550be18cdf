"""Bugs of loading: right values in the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.mutant import PARAMETERS, mutant
from refmoe.bugs.weights import mapped, with_experts, with_layers
from refmoe.spec.config import Config
from refmoe.spec.model import Layer, Parameters
from refmoe.spec.taps import LAYER_TAPS

Rows = Callable[[Any], Any]
"""A reordering of the rows of a matrix."""


def half_split(rows: Any, heads: int) -> Any:
    """Rows of heads whose pairs are interleaved, as a half-split rotation wants them: `permute` of the converters.

    rows: [heads d, ...]   returns: the same shape
    """
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def interleaved(rows: Any, heads: int) -> Any:
    """The inverse of `half_split`."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def with_q_and_k(parameters: Parameters, of_q: Rows, of_k: Rows) -> Parameters:
    """The projections of queries and keys with their rows reordered."""
    return with_layers(
        parameters, lambda layer: replace(layer, wq=mapped(layer.wq, of_q), wk=mapped(layer.wk, of_k))
    )  # fmt: skip


@mutant(
    "load-qk-permute-missing", breaks=["ROPE-3"], touches=["attention.q", "attention.k"], needs=["LOAD"],
    changes=PARAMETERS, fix="reorder the rows of wq and wk from interleaved to half-split pairs", severity="critical",
    sources=[
        "https://github.com/tatsu-lab/stanford_alpaca/issues/227",
        "https://github.com/naklecha/llama3-from-scratch/issues/20",
    ],
)  # fmt: skip
def rows_as_stored(config: Config, parameters: Parameters) -> Parameters:
    """Rows of wq and wk from a checkpoint with interleaved pairs are used as they are by a half-split rotation."""
    return with_q_and_k(
        parameters, lambda rows: interleaved(rows, config.heads), lambda rows: interleaved(rows, config.kv_heads)
    )


@mutant(
    "load-sanitise-twice", breaks=["ROPE-3"], touches=["attention.q", "attention.k"], needs=["LOAD"],
    changes=PARAMETERS, fix="convert what is not converted: loading what was saved changes nothing", severity="high",
    sources=[
        "https://github.com/Blaizzy/mlx-vlm/issues/1521",
        "https://github.com/Blaizzy/mlx-vlm/issues/1718",
    ],
)  # fmt: skip
def converted_again(config: Config, parameters: Parameters) -> Parameters:
    """The conversion of the layout runs on a checkpoint that was converted before: rows of wq and wk move once more."""
    return with_q_and_k(
        parameters, lambda rows: half_split(rows, config.heads), lambda rows: half_split(rows, config.kv_heads)
    )


@mutant(
    "load-k-permute-with-q-heads", breaks=["ROPE-3"], touches=["attention.k"], needs=["LOAD"], changes=PARAMETERS,
    fix="reorder wk by its own number of heads", severity="critical",
    sources=[
        "https://github.com/Dao-AILab/flash-attention/pull/546",
        "https://github.com/huggingface/transformers/pull/31788",
        "https://github.com/huggingface/transformers/issues/26109",
    ],
)  # fmt: skip
def keys_as_queries(config: Config, parameters: Parameters) -> Parameters:
    """The rows of wk are reordered as if there were as many key heads as query heads. Where these do not divide the
    rows into pairs the converter stops, and nothing is loaded wrongly."""
    if config.kv_heads * config.head_dim % (2 * config.heads):
        return parameters
    return with_q_and_k(
        parameters, lambda rows: rows, lambda rows: half_split(interleaved(rows, config.kv_heads), config.heads)
    )


@mutant(
    "load-qkv-group-layout", breaks=["ATTN-6"], touches=["attention.q", "attention.k", "attention.v"],
    needs=["LOAD"], changes=PARAMETERS, fix="cut the fused projection group by group: q heads, k, v, and again",
    severity="high",
    sources=["https://github.com/epfLLM/Megatron-LLM/pull/45"],
)  # fmt: skip
def fused_cut_in_three(config: Config, parameters: Parameters) -> Parameters:
    """A fused projection that holds, for each key/value head, its queries, its key and its value is cut as if it held
    all queries, all keys and all values."""
    k, d = config.kv_heads, config.head_dim
    ends = (0, config.heads * d, (config.heads + k) * d, (config.heads + 2 * k) * d)

    def cut(layer: Layer) -> Layer:
        def part(weight: Any, start: int, stop: int) -> Any:
            def fused(_: Any) -> Any:
                groups = [w.read().reshape(k, -1, config.dim) for w in (layer.wq, layer.wk, layer.wv)]  # type: ignore[attr-defined]
                return np.concatenate(groups, axis=1).reshape(-1, config.dim)[start:stop]

            return mapped(weight, fused)

        wq, wk, wv = (part(w, *ends[i : i + 2]) for i, w in enumerate((layer.wq, layer.wk, layer.wv)))
        return replace(layer, wq=wq, wk=wk, wv=wv)

    return with_layers(parameters, cut)


@mutant(
    "load-experts-silently-dropped", breaks=["EXPERT-1"], touches=["expert.gate", "expert.up", "expert.output"],
    changes=PARAMETERS, fix="account for every key: one that no parameter takes is an error", severity="critical",
    sources=["https://github.com/NVIDIA/Megatron-LM/issues/5844"],
)  # fmt: skip
def experts_not_loaded(config: Config, parameters: Parameters) -> Parameters:
    """The experts' keys have a name that the loader does not know, and are skipped: the experts stay zeros."""

    def empty(expert: Any) -> Any:
        return replace(expert, **{name: mapped(getattr(expert, name), np.zeros_like) for name in ("w1", "w2", "w3")})

    return with_experts(parameters, empty)


@mutant(
    "load-square-shape-heuristic", breaks=["EXPERT-1"], touches=["expert.gate", "expert.up", "expert.output"],
    needs=["LOAD", "SQUARE"], changes=PARAMETERS,
    fix="transpose by the name of the layout, not where the shape does not fit", severity="high",
    sources=[
        "https://github.com/huggingface/transformers/issues/47031",
        "https://github.com/unslothai/unsloth-zoo/issues/849",
    ],
)  # fmt: skip
def transposed_if_it_does_not_fit(config: Config, parameters: Parameters) -> Parameters:
    """Experts stored as [in, out] are transposed where their shape is not the expected one; a square one fits."""
    if config.hidden_dim != config.dim:
        return parameters

    def stored(expert: Any) -> Any:
        return replace(expert, **{name: mapped(getattr(expert, name), np.transpose) for name in ("w1", "w2", "w3")})

    return with_experts(parameters, stored)


WEIGHED = (
    "attention_norm", "attention.q", "attention.k", "attention.v", "attention.output", "moe_norm", "router.logits",
    "expert.gate", "expert.up", "expert.output",
)  # fmt: skip
"""The taps that parameters of a layer make."""

assert set(WEIGHED) <= LAYER_TAPS.keys()


@mutant(
    "load-layer-shift", breaks=["MODEL-2"], touches=WEIGHED, needs=["LOAD"], changes=PARAMETERS,
    fix="look for layers that count from one", severity="low",
)  # fmt: skip
def layer_after(config: Config, parameters: Parameters) -> Parameters:
    """Each layer has the parameters of the one after it, the last its own."""
    last = len(parameters.layers) - 1
    return replace(parameters, layers=tuple(parameters.layers[min(i + 1, last)] for i in range(last + 1)))
