# SPDX-License-Identifier: Apache-2.0
"""Bugs of the router, patched into transformers."""

from __future__ import annotations

from typing import Any

from tests.bugs.patched import patched
from tests.verifier.engines import Arrays
from tests.verifier.faults import Patch, set_router, wrap

JITTER = 0.01
BIASES = (0.0, 0.125, 0.0625)

# ---- weights


@patched("router-raw-logit-weights", "flat-router")
def _(patch: Patch, model: Any) -> None:
    set_router(patch, lambda logits, k: logits.float().topk(k, -1))


@patched("router-renorm-wrong-axis", "packed")
def _(patch: Patch, model: Any) -> None:
    def choose(logits: Any, k: int) -> Any:
        top, ids = logits.float().softmax(-1).topk(k, -1)
        return top / top.sum(0, keepdim=True), ids

    set_router(patch, choose)


@patched("router-softmax-over-tokens", "packed")
def _(patch: Patch, model: Any) -> None:
    def choose(logits: Any, k: int) -> Any:
        top, ids = logits[None].float().softmax(1)[0].topk(k, -1)
        return top / top.sum(-1, keepdim=True), ids

    set_router(patch, choose)


@patched("router-lowprec-logits", "near-tie")
def _(patch: Patch, model: Any) -> None:
    """The cast to float32 left out, and every operation rounded."""

    def choose(logits: Any, k: int) -> Any:
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        top, ids = (weights / weights.sum(-1, keepdim=True)).topk(k, -1)
        return (top / top.sum(-1, keepdim=True)).float(), ids

    set_router(patch, choose)


@patched("router-bias-in-weights", "every-expert")
def _(patch: Patch, model: Any) -> None:
    def choose(logits: Any, k: int) -> Any:
        bias = logits.new_tensor([BIASES[e % len(BIASES)] for e in range(logits.shape[-1])]).float()
        top, ids = (logits.float().softmax(-1) + bias).topk(k, -1)
        return top / top.sum(-1, keepdim=True), ids

    set_router(patch, choose)


@patched("router-weights-order-mismatch", "skewed-weights")
def _(patch: Patch, model: Any) -> None:
    """`topk(sorted=False)` gives ids by number, and weights are sorted."""

    def choose(logits: Any, k: int) -> Any:
        top, ids = logits.float().softmax(-1).topk(k, -1)
        return top / top.sum(-1, keepdim=True), ids.sort(-1).values

    set_router(patch, choose)


# ---- choices


@patched(
    "router-tie-break-high-index",
    "tie-second-third",
    rules="+ties=lower+compared=stored+router_order=top-k-then-softmax",
)
def _(patch: Patch, model: Any) -> None:
    """`argsort` in ascending order, read from its end."""

    def choose(logits: Any, k: int) -> Any:
        ids = logits.argsort(dim=-1, stable=True).flip(-1)[:, :k]
        return logits.float().gather(-1, ids).softmax(-1), ids

    set_router(patch, choose)


def first_slots(arrays: Arrays) -> Arrays:
    """The taps of an engine that has room only for the configured number of experts, which is two."""

    def per_slot(key: str) -> bool:
        return ".expert." in key or key.endswith(("router.experts", "router.weights"))

    return {key: array[:, :2] if per_slot(key) else array for key, array in arrays.items()}


@patched("router-wrong-k", "flat-router", dump=first_slots, elsewhere=False)
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        patch.setattr(layer.mlp.gate, "top_k", layer.mlp.gate.top_k + 1)


# ---- input


@patched("router-jitter-at-eval", "experts-12")
def _(patch: Patch, model: Any) -> None:
    """The noise of training on what the router reads."""
    import torch

    random = torch.Generator().manual_seed(1)

    def noisy(forward: Any, x: Any) -> Any:
        return forward(x * torch.empty(x.shape).uniform_(1 - JITTER, 1 + JITTER, generator=random).to(x.dtype))

    for layer in model.model.layers:
        wrap(patch, layer.mlp.gate, noisy)


@patched("router-jitter-leaks-to-experts", "near-tie")
def _(patch: Patch, model: Any) -> None:
    """transformers' own: a module that is left in training mode, where a file sets `router_jitter_noise`."""
    for layer in model.model.layers:
        patch.setattr(layer.mlp, "jitter_noise", JITTER)
        patch.setattr(layer.mlp, "training", True)
