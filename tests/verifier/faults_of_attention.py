# SPDX-License-Identifier: Apache-2.0
"""Faults of attention: projections, scores, mask, softmax, context."""

from __future__ import annotations

from typing import Any

from tests.verifier.faults import (
    ATTENDED,
    Patch,
    change_weight,
    fault,
    modeling,
    scores_of,
    set_attention,
    set_softmax,
    set_weight,
    truncated,
    wrap,
)


@fault("heads-tiled", "dims-distinct", *ATTENDED, why="repeat in the place of repeat_interleave: head h reads h % K")
def _(patch: Patch, model: Any) -> None:
    patch.setattr(modeling(), "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))


@fault("key-heads-swapped", "dims-distinct", "attention.k", why="rows of a fused projection split in another order")
def _(patch: Patch, model: Any) -> None:
    d = model.config.head_dim
    for layer in model.model.layers:
        change_weight(
            patch, layer.self_attn.k_proj, "weight", lambda w: w.reshape(-1, d, w.shape[1]).flip(0).reshape(w.shape)
        )


@fault("scale-of-the-hidden-size", "dims-distinct", "attention.probs", why="1 / sqrt(dim) in the place of head_dim")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        patch.setattr(layer.self_attn, "scaling", model.config.hidden_size**-0.5)


@fault("scale-missing", "dims-distinct", "attention.probs", why="left to a kernel that does not scale")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        patch.setattr(layer.self_attn, "scaling", 1.0)


def shift_mask(patch: Patch, by: int) -> None:
    import torch

    make = modeling().create_causal_mask

    def shifted(**kwargs: Any) -> Any:
        mask = make(**kwargs)
        if mask is None:
            return None
        rows = torch.arange(mask.shape[2]).add(by).clamp(0, mask.shape[2] - 1)
        return mask[:, :, rows]

    patch.setattr(modeling(), "create_causal_mask", shifted)


@fault("mask-shows-the-next-token", "dims-distinct", "attention.probs", why="triu with diagonal 2 in the place of 1")
def _(patch: Patch, model: Any) -> None:
    shift_mask(patch, 1)


@fault("mask-hides-the-token-itself", "dims-distinct", "attention.probs", why="a strict comparison of positions")
def _(patch: Patch, model: Any) -> None:
    shift_mask(patch, -1)


@fault("mask-aligned-top-left", "walking-skeleton", "attention.probs", why="a chunk masked as if nothing were cached")
def _(patch: Patch, model: Any) -> None:
    import torch

    make = modeling().create_causal_mask

    def aligned(**kwargs: Any) -> Any:
        mask = make(**kwargs)
        if mask is None:
            return None
        hidden = torch.triu(torch.ones(mask.shape[2:], dtype=torch.bool), 1)
        return torch.zeros_like(mask).masked_fill(hidden, torch.finfo(mask.dtype).min)

    patch.setattr(modeling(), "create_causal_mask", aligned)


@fault(
    "window-on", "walking-skeleton", "attention.probs", why="a sliding window of the config's class, not of the file"
)
def _(patch: Patch, model: Any) -> None:
    patch.setattr(model.config, "sliding_window", 8)


@fault("window-off", "window-decode", "attention.probs", why="sliding_window of the file not read")
def _(patch: Patch, model: Any) -> None:
    patch.setattr(model.config, "sliding_window", None)


@fault("window-one-too-long", "window-chunks", "attention.probs", why="<= in the place of <")
def _(patch: Patch, model: Any) -> None:
    patch.setattr(model.config, "sliding_window", model.config.sliding_window + 1)


@fault("softmax-over-queries", "dims-distinct", "attention.probs", why="dim=-2 in the place of -1")
def _(patch: Patch, model: Any) -> None:
    set_softmax(patch, lambda scores: functional_softmax(scores, -2).to(scores.dtype))


@fault("softmax-off-by-one", "dims-distinct", "attention.probs", why="1 added to the sum: an attention sink")
def _(patch: Patch, model: Any) -> None:
    def softmax(scores: Any) -> Any:
        weights = (scores.float() - scores.float().amax(-1, keepdim=True)).exp()
        return (weights / (1 + weights.sum(-1, keepdim=True))).to(scores.dtype)

    set_softmax(patch, softmax)


def functional_softmax(x: Any, axis: int) -> Any:
    return x.float().softmax(axis)


@fault("softmax-in-bfloat16", "wide", "attention.probs", why="every operation of a softmax in a low dtype")
def _(patch: Patch, model: Any) -> None:
    import torch

    def softmax(scores: Any) -> Any:
        low = scores.to(torch.bfloat16)
        weights = (low - low.amax(-1, keepdim=True)).exp()
        return (weights / weights.cumsum(-1)[..., -1:]).to(scores.dtype)

    set_softmax(patch, softmax)


@fault("probs-truncated", "wide", "attention.probs", why="a conversion that cuts bits off",
       unseen={"float32": "float32 arithmetic leaves softmax an error of several units"})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    set_softmax(patch, lambda scores: truncated(scores.double().softmax(-1), scores.dtype))


@fault("context-heads-not-transposed", "dims-distinct", "attention.context", why="heads and tokens in one reshape")
def _(patch: Patch, model: Any) -> None:
    def attend(q: Any, k: Any, v: Any, mask: Any, scaling: float, repeats: int) -> Any:
        probs = functional_softmax(scores_of(q, k, mask, scaling, repeats), -1).to(q.dtype)
        context = probs @ modeling().repeat_kv(v, repeats)
        heads, tokens = context.shape[1:3]
        return context.reshape(1, tokens, heads, -1).transpose(1, 2), probs

    set_attention(patch, attend)


@fault("output-projection-of-another-layer", "walking-skeleton", "attention.output", why="an index off by one on load")
def _(patch: Patch, model: Any) -> None:
    weights = [layer.self_attn.o_proj.weight for layer in model.model.layers]
    for layer, weight in zip(model.model.layers, weights[1:] + weights[:1], strict=True):
        set_weight(patch, layer.self_attn.o_proj, "weight", weight)


@fault("query-bias", "dims-distinct", "attention.q", why="a bias of another family, zeros in its file and one here")
def _(patch: Patch, model: Any) -> None:
    wrap(patch, model.model.layers[0].self_attn.q_proj, lambda forward, x: forward(x) + 1)
