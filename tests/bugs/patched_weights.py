# SPDX-License-Identifier: Apache-2.0
"""Bugs of loading, of norms, and of the written trace, patched into transformers."""

from __future__ import annotations

from typing import Any

from refmoe.bugs.quantised_checkpoint import INT8, quantised
from refmoe.bugs.quantised_checkpoint import quantise as quantise_rows
from refmoe.spec.model import Parameters
from tests.bugs.patched import patched
from tests.verifier.engines import Arrays, model_named
from tests.verifier.faults import Patch, change_weight, set_norm, set_weight, wrap

PAD = 2

# ---- rows of projections


def pairs_apart(w: Any, heads: int) -> Any:
    """Rows in interleaved pairs, reordered for halves."""
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs_together(w: Any, heads: int) -> Any:
    """Rows in halves, as a checkpoint with interleaved pairs stores them."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def change_q_and_k(patch: Patch, model: Any, change: Any) -> None:
    """`change(w, heads)` of both projections."""
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        change_weight(patch, layer.self_attn.q_proj, "weight", lambda w: change(w, heads))
        change_weight(patch, layer.self_attn.k_proj, "weight", lambda w: change(w, groups))


@patched("load-qk-permute-missing", "dims-distinct")
def _(patch: Patch, model: Any) -> None:
    change_q_and_k(patch, model, pairs_together)


@patched("load-sanitise-twice", "dims-distinct")
def _(patch: Patch, model: Any) -> None:
    change_q_and_k(patch, model, pairs_apart)


@patched("load-k-permute-with-q-heads", "edge-tokens")
def _(patch: Patch, model: Any) -> None:
    """The converter stops where the rows do not make as many heads."""
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        if not len(layer.self_attn.k_proj.weight) % (2 * heads):
            change_weight(
                patch, layer.self_attn.k_proj, "weight", lambda w: pairs_apart(pairs_together(w, groups), heads)
            )


@patched("load-qkv-group-layout", "dims-distinct")
def _(patch: Patch, model: Any) -> None:
    """A fused projection of groups cut as if it were of kinds."""
    import torch

    groups = model.config.num_key_value_heads
    for layer in model.model.layers:
        parts = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        fused: Any = torch.cat([part.weight.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)
        for part, rows in zip(parts, fused.split([len(part.weight) for part in parts]), strict=True):
            set_weight(patch, part, "weight", rows.clone())


@patched("load-layer-shift", "four-layers")
def _(patch: Patch, model: Any) -> None:
    """Names that count from one: each layer has the next one's, the last its own."""
    layers = [dict(layer.named_parameters()) for layer in model.model.layers]
    for layer, source in zip(model.model.layers, layers[1:], strict=False):
        for name, value in source.items():
            path, _, leaf = name.rpartition(".")
            set_weight(patch, layer.get_submodule(path), leaf, value)


@patched("emb-pad-row-zeroed", "edge-tokens")
def _(patch: Patch, model: Any) -> None:
    """`padding_idx`, whose row an initialisation clears."""
    import torch

    keep = torch.arange(model.config.vocab_size)[:, None] != PAD
    change_weight(patch, model.model.embed_tokens, "weight", lambda w: w * keep)


# ---- quantised checkpoints: what is loaded are the dequantised weights


def held(name: str) -> Parameters:
    """A golden case's weights in int8, its norms smoothed."""
    return quantised(model_named(name).checkpoint.parameters, INT8)


def load(patch: Patch, model: Any, parameters: Parameters) -> None:
    """The weights of a model."""
    import numpy as np
    import torch

    def put(module: Any, name: str, *weights: Any) -> None:
        value = np.concatenate([np.asarray(weight.read(), np.float64) for weight in weights])
        set_weight(patch, module, name, torch.tensor(value).to(model.dtype))

    for layer, p in zip(model.model.layers, parameters.layers, strict=True):
        for kind in "qkvo":
            put(getattr(layer.self_attn, f"{kind}_proj"), "weight", getattr(p, f"w{kind}"))
        put(layer.post_attention_layernorm, "weight", p.moe_norm)
        put(layer.mlp.gate, "weight", p.router)
        experts: list[Any] = list(p.experts)
        fused = [torch.tensor(np.concatenate([e.w1.read(), e.w3.read()])) for e in experts]
        set_weight(patch, layer.mlp.experts, "gate_up_proj", torch.stack(fused).to(model.dtype))
        downs = torch.stack([torch.tensor(e.w2.read()) for e in experts])
        set_weight(patch, layer.mlp.experts, "down_proj", downs.to(model.dtype))


@patched("quant-router-quantised", "mini-8x7b", quantised=True)
def _(patch: Patch, model: Any) -> None:
    import torch

    parameters = held("mini-8x7b")
    load(patch, model, parameters)
    for layer, p in zip(model.model.layers, parameters.layers, strict=True):
        gate: Any = p.router
        values = torch.tensor(quantise_rows(gate.read(), INT8).values())
        set_weight(patch, layer.mlp.gate, "weight", values.to(model.dtype))


def scaled(codes: Any, scales: Any) -> Any:
    """Codes [m, n] times scales [m, n / 32, the last group shorter], in float64."""
    import torch

    spread = torch.tensor(scales).double().repeat_interleave(32, 1)[:, : codes.shape[1]]
    return torch.tensor(codes).double() * spread


@patched("quant-w3-scale-dropped", "mini-8x7b", quantised=True)
def _(patch: Patch, model: Any) -> None:
    """`scale = scales[0]` of a stack of two."""
    import torch

    parameters = held("mini-8x7b")
    load(patch, model, parameters)
    for layer, p in zip(model.model.layers, parameters.layers, strict=True):
        experts: list[Any] = list(p.experts)
        ups = torch.stack([scaled(e.w3.stored().codes, e.w1.stored().scales) for e in experts])
        fused = layer.mlp.experts.gate_up_proj
        set_weight(patch, layer.mlp.experts, "gate_up_proj", torch.cat((fused[:, : ups.shape[1]], ups.to(fused)), 1))


@patched("quant-qk-scale-not-permuted", "mini-8x7b", quantised=True)
def _(patch: Patch, model: Any) -> None:
    """Codes reordered for halves, scales left as the file with interleaved pairs has them."""
    import torch

    parameters = held("mini-8x7b")
    load(patch, model, parameters)
    for layer, p in zip(model.model.layers, parameters.layers, strict=True):
        for part, weight, heads in (
            (layer.self_attn.q_proj, p.wq, model.config.num_attention_heads),
            (layer.self_attn.k_proj, p.wk, model.config.num_key_value_heads),
        ):
            stored: Any = weight.stored()  # type: ignore[attr-defined]
            wrong = scaled(stored.codes, pairs_together(torch.tensor(stored.scales), heads).numpy())
            set_weight(patch, part, "weight", wrong.to(model.dtype))


@patched("quant-smoothing-skips-router", "mini-8x7b", quantised=True)
def _(patch: Patch, model: Any) -> None:
    """The router matrix of the file, although its input was divided."""
    import torch

    load(patch, model, held("mini-8x7b"))
    for layer, p in zip(model.model.layers, model_named("mini-8x7b").checkpoint.parameters.layers, strict=True):
        gate: Any = p.router
        set_weight(patch, layer.mlp.gate, "weight", torch.tensor(gate.read().astype("float64")).to(model.dtype))


# ---- norms


@patched("norm-applied-twice", "mean-not-zero")
def _(patch: Patch, model: Any) -> None:
    def once(x: Any, gain: Any, eps: float) -> Any:
        y = x.float()
        return gain * (y * (y.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)

    set_norm(patch, lambda x, gain, eps: once(once(x, gain, eps), gain, eps))


@patched("norm-lowprec-variance", "huge-embedding")
def _(patch: Patch, model: Any) -> None:
    """The statistic without its cast to float32."""

    def norm(x: Any, gain: Any, eps: float) -> Any:
        return gain * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt())

    set_norm(patch, norm)


# ---- what is written


def of_the_layer_before(arrays: Arrays) -> Arrays:
    """Hidden states as `output_hidden_states` counts them: the first is the embedding."""

    def before(key: str) -> str:
        run, _, tap = key.partition("/")
        layer = int(tap.split(".")[1])
        return f"{run}/layers.{layer - 1}.residual" if layer else f"{run}/embedding"

    return {key: arrays[before(key)] if key.endswith(".residual") else array for key, array in arrays.items()}


@patched("hidden-tap-off-by-one", "four-layers", dump=of_the_layer_before)
def _(patch: Patch, model: Any) -> None:
    """The model itself is right."""


@patched("prec-logits-lowprec", "near-tie-logits")
def _(patch: Patch, model: Any) -> None:
    import torch

    wrap(patch, model.lm_head, lambda forward, x: forward(x).to(torch.bfloat16).to(x.dtype))
