# SPDX-License-Identifier: Apache-2.0
"""Faults of the router, the experts and their combination."""

from __future__ import annotations

from typing import Any

from tests.verifier.faults import (
    SAME_BITS,
    Patch,
    change_weight,
    fault,
    functional,
    is_down,
    set_linear,
    set_router,
    truncated,
    wrap,
)


def each_experts(patch: Patch, model: Any, change: Any) -> None:
    for layer in model.model.layers:
        wrap(patch, layer.mlp.experts, change)


# ---- router


def renormalised(probs: Any, k: int) -> Any:
    top, ids = probs.topk(k, -1)
    return top / top.sum(-1, keepdim=True), ids


@fault("router-weights-not-renormalised", "dims-distinct", "router.weights", why="softmax over all, then top-k, as is")
def _(patch: Patch, model: Any) -> None:
    set_router(patch, lambda logits, k: logits.float().softmax(-1).topk(k, -1))


@fault("router-softmax-twice", "dims-distinct", "router.weights", why="a softmax over the chosen probabilities")
def _(patch: Patch, model: Any) -> None:
    def choose(logits: Any, k: int) -> Any:
        top, ids = logits.float().softmax(-1).topk(k, -1)
        return top.softmax(-1), ids

    set_router(patch, choose)


@fault("router-sigmoid", "dims-distinct", "router.weights", why="the scores of DeepSeek-V3")
def _(patch: Patch, model: Any) -> None:
    def choose(logits: Any, k: int) -> Any:
        top, ids = logits.float().topk(k, -1)
        return top.sigmoid() / top.sigmoid().sum(-1, keepdim=True), ids

    set_router(patch, choose)


@fault("router-softmax-in-bfloat16", "dims-distinct", "router.weights", why="the cast to float32 left out")
def _(patch: Patch, model: Any) -> None:
    import torch

    def choose(logits: Any, k: int) -> Any:
        _, ids = logits.float().softmax(-1).topk(k, -1)
        low = logits.to(torch.bfloat16)
        weights = (low - low.amax(-1, keepdim=True)).exp().gather(-1, ids)
        return (weights / weights.sum(-1, keepdim=True)).float(), ids

    set_router(patch, choose)


@fault("router-takes-second-and-third", "dims-distinct", "router.experts", why="a sort whose first is skipped")
def _(patch: Patch, model: Any) -> None:
    def choose(logits: Any, k: int) -> Any:
        top, ids = logits.float().topk(k + 1, -1)
        return top[:, 1:].softmax(-1), ids[:, 1:]

    set_router(patch, choose)


@fault("router-takes-the-lowest", "dims-distinct", "router.experts", why="a sort in ascending order")
def _(patch: Patch, model: Any) -> None:
    def choose(logits: Any, k: int) -> Any:
        top, ids = logits.float().topk(k, -1, largest=False)
        return top.softmax(-1), ids

    set_router(patch, choose)


@fault("router-reads-the-residual", "dims-distinct", "router.logits", why="the gate before the norm")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        kept: dict[str, Any] = {}

        def norm(forward: Any, x: Any, kept: Any = kept) -> Any:
            kept["x"] = x
            return forward(x)

        wrap(patch, layer.post_attention_layernorm, norm)
        wrap(patch, layer.mlp.gate, lambda forward, _, kept=kept: forward(kept["x"]))


@fault("router-bias", "dims-distinct", "router.logits", why="a correction for balance that belongs to training")
def _(patch: Patch, model: Any) -> None:
    import torch

    def choose(forward: Any, x: Any) -> Any:
        logits, _, _ = forward(x)
        logits = logits + torch.linspace(-0.5, 0.5, logits.shape[-1], dtype=logits.dtype)
        return logits, *renormalised(logits.float().softmax(-1), 2)

    for layer in model.model.layers:
        wrap(patch, layer.mlp.gate, choose)


# ---- experts


@fault("gate-and-up-swapped-on-load", "dims-distinct", "expert.gate", "expert.up", why="w3 and w1 fused in that order")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        change_weight(patch, layer.mlp.experts, "gate_up_proj", lambda w: w.roll(w.shape[1] // 2, 1))


def set_activation(patch: Patch, model: Any, activation: Any) -> None:
    for layer in model.model.layers:
        patch.setattr(layer.mlp.experts.act_fn, "forward", activation)


@fault("gate-and-up-swapped", "dims-distinct", "expert.hidden", why="gate times silu(up)")
def _(patch: Patch, model: Any) -> None:
    import torch

    class Gate(torch.Tensor):
        """The replacement of silu(gate): the gate itself, which later multiplies silu(up)."""

        def __mul__(self, up: Any) -> Any:
            return self.as_subclass(torch.Tensor) * functional().silu(up)

    set_activation(patch, model, lambda gate: gate.as_subclass(Gate))


@fault("gelu", "dims-distinct", "expert.hidden", why="hidden_act not read")
def _(patch: Patch, model: Any) -> None:
    set_activation(patch, model, functional().gelu)


@fault("relu", "dims-distinct", "expert.hidden", why="hidden_act not read")
def _(patch: Patch, model: Any) -> None:
    set_activation(patch, model, functional().relu)


@fault("silu-in-bfloat16", "dims-distinct", "expert.hidden", why="a table of 2^16 values",
       unseen={"bfloat16": SAME_BITS})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    import torch

    set_activation(patch, model, lambda x: functional().silu(x.to(torch.bfloat16)).to(x.dtype))


@fault("experts-off-by-one", "dims-distinct", "expert.gate", "expert.up", "expert.output", why="ids that count from 1")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            change_weight(patch, layer.mlp.experts, name, lambda w: w.roll(1, 0))


@fault("down-projections-off-by-one", "dims-distinct", "expert.output", why="one of three files numbered otherwise")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        change_weight(patch, layer.mlp.experts, "down_proj", lambda w: w.roll(1, 0))


def drop_columns(patch: Patch, model: Any, count: int) -> None:
    import torch

    for layer in model.model.layers:
        change_weight(
            patch,
            layer.mlp.experts,
            "down_proj",
            lambda w: torch.cat((w[..., :-count], torch.zeros_like(w[..., -count:])), -1),
        )


@fault("down-drops-its-last-term", "wide", "expert.output", why="a loop that ends one too early")
def _(patch: Patch, model: Any) -> None:
    drop_columns(patch, model, 1)


@fault("down-drops-its-last-32-terms", "wide", "expert.output", why="a block that a kernel leaves out")
def _(patch: Patch, model: Any) -> None:
    drop_columns(patch, model, 32)


def accumulated(dtype_name: str, block: int) -> Any:
    """x w^T whose running sum is rounded to a dtype after every block."""
    import torch

    def product(x: Any, w: Any) -> Any:
        dtype, total = getattr(torch, dtype_name), torch.zeros(len(x), len(w))
        for start in range(0, w.shape[1], block):
            part = x[:, start : start + block].float() @ w[:, start : start + block].float().T
            total = (total + part).to(dtype).float()
        return total.to(x.dtype)

    return product


@fault("down-sums-in-float16", "wide", "expert.output", why="float16 accumulators of tensor cores, per 32 terms")
def _(patch: Patch, model: Any) -> None:
    set_linear(patch, is_down(model), accumulated("float16", 32))


@fault("down-sums-in-bfloat16", "wide", "expert.output", why="split-K whose parts are stored, per 64 terms")
def _(patch: Patch, model: Any) -> None:
    set_linear(patch, is_down(model), accumulated("bfloat16", 64))


@fault("down-truncated", "wide", "expert.output", why="a conversion that cuts bits off",
       unseen={"float32": "320 roundings of a float32 sum are more than the one of its end"})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    set_linear(patch, is_down(model), lambda x, w: truncated(x.double() @ w.double().T, x.dtype))


# ---- combination


@fault("weight-twice", "dims-distinct", "moe.output", why="in the expert and in the combination")
def _(patch: Patch, model: Any) -> None:
    each_experts(patch, model, lambda forward, x, ids, weights: forward(x, ids, weights * weights))


@fault("weight-missing", "dims-distinct", "moe.output", why="outputs added as they are")
def _(patch: Patch, model: Any) -> None:
    each_experts(patch, model, lambda forward, x, ids, weights: forward(x, ids, weights.new_ones(weights.shape)))


@fault("weights-swapped", "dims-distinct", "moe.output", why="weights in the order of ids, experts in that of logits")
def _(patch: Patch, model: Any) -> None:
    each_experts(patch, model, lambda forward, x, ids, weights: forward(x, ids, weights.flip(-1)))


@fault("weight-in-bfloat16", "wide", "moe.output", why="cast with the hidden state")
def _(patch: Patch, model: Any) -> None:
    import torch

    each_experts(
        patch, model, lambda forward, x, ids, weights: forward(x, ids, weights.to(torch.bfloat16).to(weights.dtype))
    )


@fault("last-expert-overwrites", "dims-distinct", "moe.output", why="an indexed assignment in the place of an addition")
def _(patch: Patch, model: Any) -> None:
    def overwrite(forward: Any, x: Any, ids: Any, weights: Any) -> Any:
        return forward(x, ids, weights.where(ids == ids.amax(-1, keepdim=True), weights.new_zeros(())))

    each_experts(patch, model, overwrite)


@fault("expert-over-capacity", "every-expert", "moe.output", why="tokens beyond the capacity of training are dropped")
def _(patch: Patch, model: Any) -> None:
    import torch

    def capped(forward: Any, x: Any, ids: Any, weights: Any) -> Any:
        rank = torch.nn.functional.one_hot(ids, ids.max() + 1).sum(1).cumsum(0).gather(-1, ids)
        return forward(x, ids, weights * (rank <= 4))

    each_experts(patch, model, capped)
