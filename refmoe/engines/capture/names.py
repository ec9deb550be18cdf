# SPDX-License-Identifier: Apache-2.0
"""Names that engines give to the taps: one table per engine.

`{i}` stands for the layer. ``:in`` after a module's name means its input, ``:out`` its output; a number after that
picks one of several. The names of modules come from the engines' own source.
"""

from __future__ import annotations

from collections.abc import Mapping

HUGGING_FACE = {
    "model.embed_tokens:out": "embedding",
    "model.layers.{i}.input_layernorm:out": "attention_norm",
    "model.layers.{i}.self_attn.q_proj:out": "attention.q",
    "model.layers.{i}.self_attn.k_proj:out": "attention.k",
    "model.layers.{i}.self_attn.v_proj:out": "attention.v",
    "model.layers.{i}.self_attn:out1": "attention.probs",  # eager attention only
    "model.layers.{i}.self_attn.o_proj:in": "attention.context",
    "model.layers.{i}.self_attn.o_proj:out": "attention.output",
    "model.layers.{i}.post_attention_layernorm:in": "attention_residual",
    "model.layers.{i}.post_attention_layernorm:out": "moe_norm",
    "model.layers.{i}.mlp.gate:out0": "router.logits",
    "model.layers.{i}.mlp.gate:out1": "router.weights",
    "model.layers.{i}.mlp.gate:out2": "router.experts",
    "model.layers.{i}.mlp:out": "moe.output",
    "model.layers.{i}:out": "residual",
    "model.norm:out": "final_norm",
    "lm_head:out": "logits",
}
"""Modules of transformers 5, `MixtralForCausalLM`, to taps."""

MISTRAL = {
    "tok_embeddings:out": "embedding",
    "layers.{i}.attention_norm:out": "attention_norm",
    "layers.{i}.attention.wq:out": "attention.q",  # rotary pairs interleaved
    "layers.{i}.attention.wk:out": "attention.k",  # rotary pairs interleaved
    "layers.{i}.attention.wv:out": "attention.v",
    "layers.{i}.attention.wo:in": "attention.context",
    "layers.{i}.attention.wo:out": "attention.output",
    "layers.{i}.ffn_norm:in": "attention_residual",
    "layers.{i}.ffn_norm:out": "moe_norm",
    "layers.{i}.feed_forward.gate:out": "router.logits",
    "layers.{i}.feed_forward:out": "moe.output",
    "layers.{i}:out": "residual",
    "norm:out": "final_norm",
    "output:out": "logits",
}
"""Modules of mistral-inference, `Transformer`, to taps."""


def tap_of(table: Mapping[str, str], name: str) -> str | None:
    """The tap, with its layer, of an engine's name. None when the name is not in the table."""
    if name in table:
        return table[name]
    module, colon, end = name.rpartition(":")
    parts = (module if colon else name).split(".")
    for at, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            tap = table.get(".".join([*parts[:at], "{i}", *parts[at + 1 :]]) + (f":{end}" if colon else ""))
            if tap is not None:
                return f"layers.{part}.{tap}"
    return None
