# SPDX-License-Identifier: Apache-2.0
"""Bugs of loading: right values in the wrong place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.changed_weights import mapped, with_experts, with_layers
from refmoe.bugs.mutant import PARAMETERS, mutant
from refmoe.spec.config import Config
from refmoe.spec.model import Layer, Parameters
from refmoe.spec.taps import LAYER_TAPS

Rows = Callable[[Any], Any]
"""A reordering of the rows of a matrix."""


def half_split(rows: Any, heads: int) -> Any:
    """Rows reordered from interleaved pairs to half-split pairs: `permute` of the converters.

    rows: [heads d, ...]   returns: the same shape
    """
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def interleaved(rows: Any, heads: int) -> Any:
    """The inverse of `half_split`."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def with_q_and_k(parameters: Parameters, of_q: Rows, of_k: Rows) -> Parameters:
    """The parameters with the rows of wq and wk reordered."""
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
    """The checkpoint has interleaved pairs, and a half-split rotation uses its rows of wq and wk as they are."""
    return with_q_and_k(
        parameters, lambda rows: interleaved(rows, config.heads), lambda rows: interleaved(rows, config.kv_heads)
    )


@mutant(
    "load-sanitise-twice", breaks=["ROPE-3"], touches=["attention.q", "attention.k"], needs=["LOAD"],
    changes=PARAMETERS, fix="convert only checkpoints that are not converted: saving and loading must change nothing",
    sources=[
        "https://github.com/Blaizzy/mlx-vlm/issues/1521",
        "https://github.com/Blaizzy/mlx-vlm/issues/1718",
    ],
)  # fmt: skip
def converted_again(config: Config, parameters: Parameters) -> Parameters:
    """The layout of a checkpoint that was already converted is converted again: the rows of wq and wk move once
    more."""
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
    """The rows of wk are reordered as if there were as many key heads as query heads. If that number does not divide
    the rows into pairs, the converter stops and loads nothing."""
    if config.kv_heads * config.head_dim % (2 * config.heads):
        return parameters
    return with_q_and_k(
        parameters, lambda rows: rows, lambda rows: half_split(interleaved(rows, config.kv_heads), config.heads)
    )


@mutant(
    "load-qkv-group-layout", breaks=["ATTN-6"], touches=["attention.q", "attention.k", "attention.v"],
    needs=["LOAD"], changes=PARAMETERS, fix="cut the fused projection group by group: q heads, k, v, and again",
    sources=["https://github.com/epfLLM/Megatron-LLM/pull/45"],
)  # fmt: skip
def fused_cut_in_three(config: Config, parameters: Parameters) -> Parameters:
    """A fused projection holds queries, key and value for each key/value head in turn. It is cut as if it held all
    queries, then all keys, then all values."""
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
    """The loader does not know the keys of the experts and skips them: the experts stay zeros."""

    def empty(expert: Any) -> Any:
        return replace(expert, **{name: mapped(getattr(expert, name), np.zeros_like) for name in ("w1", "w2", "w3")})

    return with_experts(parameters, empty)


@mutant(
    "load-square-shape-heuristic", breaks=["EXPERT-1"], touches=["expert.gate", "expert.up", "expert.output"],
    needs=["LOAD", "SQUARE"], changes=PARAMETERS,
    fix="transpose by the name of the layout, not where the shape does not fit",
    sources=[
        "https://github.com/huggingface/transformers/issues/47031",
        "https://github.com/unslothai/unsloth-zoo/issues/849",
    ],
)  # fmt: skip
def transposed_if_it_does_not_fit(config: Config, parameters: Parameters) -> Parameters:
    """Experts are stored as (in, out) and are transposed only if their shape is not the expected one. A square matrix
    fits and is not transposed."""
    if config.hidden_dim != config.dim:
        return parameters

    def stored(expert: Any) -> Any:
        return replace(expert, **{name: mapped(getattr(expert, name), np.transpose) for name in ("w1", "w2", "w3")})

    return with_experts(parameters, stored)


WEIGHED = (
    "attention_norm", "attention.q", "attention.k", "attention.v", "attention.output", "moe_norm", "router.logits",
    "expert.gate", "expert.up", "expert.output",
)  # fmt: skip
"""The taps that the parameters of a layer compute."""

assert set(WEIGHED) <= LAYER_TAPS.keys()


@mutant(
    "load-layer-shift", breaks=["MODEL-2"], touches=WEIGHED, needs=["LOAD"], changes=PARAMETERS,
    fix="look for layers that count from one", severity="low",
)  # fmt: skip
def layer_after(config: Config, parameters: Parameters) -> Parameters:
    """Each layer has the parameters of the next layer; the last layer keeps its own."""
    last = len(parameters.layers) - 1
    return replace(parameters, layers=tuple(parameters.layers[min(i + 1, last)] for i in range(last + 1)))


# ---- met since: fused projections, adapters of experts

BLOCK = 4
"""Rows of gate, then of up, that alternate in a fused projection. Real blocks have 32 and more."""


def with_gate_and_up(parameters: Parameters, change: Callable[[Any, Any], tuple[Any, Any]]) -> Parameters:
    """The parameters with w1 and w3 of each expert changed together.   change: both matrices to both, [F, D] each"""

    def changed(expert: Any) -> Any:
        gate, up = expert.w1, expert.w3
        return replace(
            expert,
            w1=mapped(gate, lambda rows: change(rows, up.read())[0]),
            w3=mapped(up, lambda rows: change(gate.read(), rows)[1]),
        )

    return with_experts(parameters, changed)


@mutant(
    "load-gate-up-blocks-as-halves", breaks=["EXPERT-1"], touches=["expert.gate", "expert.up"], needs=["LOAD"],
    changes=PARAMETERS, fix="take gate and up from alternating blocks of rows, as the fused projection stores them",
    sources=[
        "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/3478",
        "https://github.com/NVIDIA/TransformerEngine/pull/2642",
    ],
)  # fmt: skip
def blocks_as_halves(config: Config, parameters: Parameters) -> Parameters:
    """The fused projection alternates blocks of gate rows and of up rows. It is cut into halves, as if all gate rows
    came first."""
    size = BLOCK if config.hidden_dim % BLOCK == 0 else 1

    def halves(gate: Any, up: Any) -> tuple[Any, Any]:
        blocks = [rows.reshape(-1, size, rows.shape[1]) for rows in (gate, up)]
        fused = np.stack(blocks, axis=1).reshape(2 * len(gate), -1)
        return fused[: len(gate)], fused[len(gate) :]

    return with_gate_and_up(parameters, halves)


@mutant(
    "load-gate-up-sharded-as-one", breaks=["EXPERT-1", "SHARD-5"], touches=["expert.gate", "expert.up"],
    needs=["LOAD"], changes=PARAMETERS, severity="critical",
    fix="cut gate and up apart first, and then each over the ranks",
    sources=[
        "https://github.com/xLLM-AI/xllm/pull/1616",
        "https://github.com/tenstorrent/tt-forge-models/pull/855",
    ],
)  # fmt: skip
def sharded_as_one(config: Config, parameters: Parameters) -> Parameters:
    """The fused projection, gate above up, is cut over two ranks as one matrix. One rank has all of the gate and takes
    half of it for up; the other has up only."""

    def of_two_ranks(gate: Any, up: Any) -> tuple[Any, Any]:
        half = len(gate) - len(gate) // 2
        first, second = (np.concatenate([gate[part], up[part]]) for part in (slice(half), slice(half, None)))
        return (first, second) if len(gate) % 2 == 0 else (gate, up)

    return with_gate_and_up(parameters, of_two_ranks)


RANK = 2
"""The rank of the adapters that stand for those of a tuned checkpoint."""


def adapters(expert: Any) -> dict[str, tuple[Any, Any]]:
    """Per matrix of an expert an adapter of low rank: its first rows, each mixed into all rows in turn.

    returns: B [m, RANK] and A [RANK, n]; B A is of the size of a quarter of the matrix.
    """
    found = {}
    for name in ("w1", "w2", "w3"):
        rows = np.asarray(getattr(expert, name).read(), np.float64)
        mixing = np.where((np.arange(len(rows))[:, None] + np.arange(RANK)) % 3, 0.125, -0.25)
        found[name] = (mixing, rows[:RANK])
    return found


def with_adapters(parameters: Parameters, paired: Callable[[list[Any], int, str], Any]) -> Parameters:
    """The parameters with a change added to every matrix of every expert.

    paired: from the adapters of a layer's experts, the number of an expert and a matrix, the change [m, n]
    """

    def change(layer: Layer) -> Layer:
        held = [adapters(expert) for expert in layer.experts]

        def tuned(number: int, expert: Any) -> Any:
            def one(name: str) -> Any:
                weight = getattr(expert, name)
                return mapped(weight, lambda rows: (rows + paired(held, number, name)).astype(rows.dtype))

            return replace(expert, **{name: one(name) for name in ("w1", "w2", "w3")})

        return replace(layer, experts=tuple(tuned(number, expert) for number, expert in enumerate(layer.experts)))

    return with_layers(parameters, change)


@mutant(
    "load-expert-adapters-dropped", breaks=["EXPERT-1"], touches=["expert.gate", "expert.up", "expert.output"],
    changes=PARAMETERS, severity="critical",
    fix="account for every adapter: one that no parameter takes is an error",
    sources=[
        "https://github.com/unslothai/unsloth-zoo/pull/812",
        "https://github.com/unslothai/unsloth-zoo/pull/779",
        "https://github.com/vllm-project/vllm/issues/41754",
    ],
)  # fmt: skip
def without_adapters(config: Config, parameters: Parameters) -> Parameters:
    """The adapters of the experts are not merged, because no rule knows their keys. Attention is merged. The checkpoint
    here is the merged one, and the engine's experts lack an adapter of rank 2."""
    return with_adapters(parameters, lambda held, number, name: -(held[number][name][0] @ held[number][name][1]))


@mutant(
    "load-expert-adapters-mispaired", breaks=["EXPERT-1"], touches=["expert.gate", "expert.up", "expert.output"],
    needs=["LOAD"], changes=PARAMETERS, severity="critical",
    fix="read both factors of a fused adapter in the order of experts and ranks in which they were packed",
    sources=[
        "https://github.com/unslothai/unsloth-zoo/pull/1269",
        "https://github.com/unslothai/unsloth/issues/6930",
    ],
)  # fmt: skip
def mispaired(config: Config, parameters: Parameters) -> Parameters:
    """The two factors of the experts' adapters are packed in different orders and read in the same. The first factor of
    each expert meets the second one of another."""

    def change(held: list[Any], number: int, name: str) -> Any:
        mixing, own = held[number][name]
        return mixing @ (held[(number + 1) % len(held)][name][1] - own)

    return with_adapters(parameters, change)
