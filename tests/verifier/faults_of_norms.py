# SPDX-License-Identifier: Apache-2.0
"""Faults of norms, of the residual stream, and of what comes before and after the layers."""

from __future__ import annotations

from typing import Any

from tests.verifier.faults import (
    SAME_BITS,
    Patch,
    change_weight,
    fault,
    norms,
    set_linear,
    set_norm,
    set_weight,
    wrap,
)

NORMS = ("attention_norm", "moe_norm", "final_norm")


@fault("norm-divides-by-n-1", "dims-distinct", *NORMS, why="an unbiased variance, as torch.var gives")
def _(patch: Patch, model: Any) -> None:
    def norm(x: Any, gain: Any, eps: float) -> Any:
        y = x.float()
        mean = y.pow(2).sum(-1, keepdim=True) / (y.shape[-1] - 1)
        return gain * (y * (mean + eps).rsqrt()).to(x.dtype)

    set_norm(patch, norm)


@fault("norm-subtracts-the-mean", "mean-not-zero", *NORMS, why="LayerNorm in the place of RMSNorm")
def _(patch: Patch, model: Any) -> None:
    def norm(x: Any, gain: Any, eps: float) -> Any:
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        return gain * (y * (y.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)

    set_norm(patch, norm)


@fault("norm-gain-plus-one", "dims-distinct", *NORMS, why="Gemma stores the gain less one")
def _(patch: Patch, model: Any) -> None:
    for module in norms(model):
        change_weight(patch, module, "weight", lambda gain: gain + 1)


@fault(
    "norm-gains-of-the-other-norm", "walking-skeleton", "attention_norm", "moe_norm", why="two names swapped on load"
)
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        one, two = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        set_weight(patch, layer.input_layernorm, "weight", two)
        set_weight(patch, layer.post_attention_layernorm, "weight", one)


@fault("norm-eps-1e-6", "tiny-embedding", *NORMS, why="the default of the config class, where the field is not read")
def _(patch: Patch, model: Any) -> None:
    for module in norms(model):
        patch.setattr(module, "variance_epsilon", 1e-6)


@fault("norm-eps-outside-the-root", "tiny-embedding", *NORMS, why="x / (rms + eps)")
def _(patch: Patch, model: Any) -> None:
    def norm(x: Any, gain: Any, eps: float) -> Any:
        y = x.float()
        return gain * (y / (y.pow(2).mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)

    set_norm(patch, norm)


@fault(
    "norm-statistic-in-the-storage-type", "dims-distinct", *NORMS, why="the cast to float32 left out",
    unseen={"float32": SAME_BITS},
)  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    def norm(x: Any, gain: Any, eps: float) -> Any:
        return gain * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt())

    set_norm(patch, norm)


@fault("norm-in-float16", "walking-skeleton", *NORMS, why="an autocast that covers the norm")
def _(patch: Patch, model: Any) -> None:
    import torch

    def norm(x: Any, gain: Any, eps: float) -> Any:
        y = x.to(torch.float16)
        mean = (y * y).cumsum(-1)[..., -1:] / y.shape[-1]  # every partial sum is rounded
        return gain * (y * (mean + eps).rsqrt()).to(x.dtype)

    set_norm(patch, norm)


@fault("final-norm-missing", "dims-distinct", "final_norm", why="the head applied to the last hidden state")
def _(patch: Patch, model: Any) -> None:
    wrap(patch, model.model.norm, lambda _, x: x)


@fault("residual-from-the-norm", "dims-distinct", "attention_residual", why="the residual saved after the norm")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        kept: dict[str, Any] = {}

        def norm(forward: Any, x: Any, kept: Any = kept) -> Any:
            kept["x"], kept["normed"] = x, forward(x)
            return kept["normed"]

        def after(forward: Any, h: Any, kept: Any = kept) -> Any:
            return forward(h)

        wrap(patch, layer.input_layernorm, norm)

        def forward(x: Any, layer: Any = layer, **kwargs: Any) -> Any:
            normed = layer.input_layernorm(x)
            attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
            h = normed + attended
            return h + layer.mlp(layer.post_attention_layernorm(h))

        patch.setattr(layer, "forward", forward)


@fault("residual-added-twice", "dims-distinct", "residual", why="a fused add before an add that was left in")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        wrap(patch, layer, lambda forward, x, **kwargs: forward(x, **kwargs) + x)


@fault("residual-in-bfloat16", "dims-distinct", "attention_residual", "residual", why="a stream kept in half the bytes",
       unseen={"bfloat16": SAME_BITS})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    import torch

    def low(x: Any) -> Any:
        return x.to(torch.bfloat16).to(x.dtype)

    for layer in model.model.layers:

        def forward(x: Any, layer: Any = layer, **kwargs: Any) -> Any:
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)
            h = low(x + attended)
            return low(h + layer.mlp(layer.post_attention_layernorm(h)))

        patch.setattr(layer, "forward", forward)


@fault("embedding-scaled", "dims-distinct", "embedding", why="Gemma multiplies by the root of the dimension")
def _(patch: Patch, model: Any) -> None:
    wrap(patch, model.model.embed_tokens, lambda forward, ids: forward(ids) * model.config.hidden_size**0.5)


@fault("embedding-of-the-next-token", "dims-distinct", "embedding", why="a vocabulary with one token more in front")
def _(patch: Patch, model: Any) -> None:
    wrap(patch, model.model.embed_tokens, lambda forward, ids: forward((ids + 1) % model.config.vocab_size))


@fault("output-tied-to-the-embedding", "dims-distinct", "logits", why="tie_word_embeddings taken for true")
def _(patch: Patch, model: Any) -> None:
    set_weight(patch, model.lm_head, "weight", model.model.embed_tokens.weight)


@fault("logits-in-bfloat16", "dims-distinct", "logits", why="the head's result cast before sampling",
       unseen={"bfloat16": SAME_BITS})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    import torch

    wrap(patch, model.lm_head, lambda forward, x: forward(x).to(torch.bfloat16).to(x.dtype))


@fault("tensor-float-32", "dims-distinct", "attention.q", "attention.k", "attention.v", "attention.output",
       "expert.gate", "expert.up", "expert.output", "logits",
       why="torch.backends.cuda.matmul.allow_tf32: inputs of products keep 11 bits",
       unseen={"bfloat16": SAME_BITS, "float16": SAME_BITS})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    import torch

    def low(x: Any) -> Any:
        bits = x.contiguous().view(torch.int32) + 0x1000  # half of the last bit that stays
        return (bits & ~0x1FFF).view(torch.float32)

    if model.dtype == torch.float32:
        gates = {layer.mlp.gate.weight.data_ptr() for layer in model.model.layers}
        set_linear(patch, lambda w: w.data_ptr() not in gates, lambda x, w: low(x) @ low(w).T)
