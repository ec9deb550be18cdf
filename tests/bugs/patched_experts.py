# SPDX-License-Identifier: Apache-2.0
"""Bugs of the experts and of what is done with their outputs, patched into transformers."""

from __future__ import annotations

from typing import Any

from tests.bugs.patched import added, as_read, grouped, patched, set_experts
from tests.verifier.faults import Patch, change_weight, functional, is_down, set_linear, wrap

TILE = 32
"""Tokens of a tile."""
ALIGN = 8
"""Rows that a grouped product gives an expert without tokens."""
ROWS = 100
"""Rows after which an offset wraps: as much fewer than 2^31 / 28672 as the golden cases are shorter than a context."""

# ---- what an expert computes


@patched("expert-gelu", "mini-8x7b")
def _(patch: Patch, model: Any) -> None:
    """`gelu_new`, the tanh form."""
    for layer in model.model.layers:
        patch.setattr(layer.mlp.experts.act_fn, "forward", lambda x: functional().gelu(x, approximate="tanh"))


@patched("expert-w2-transposed", "dims-distinct")
def _(patch: Patch, model: Any) -> None:
    """`view` where a transposition was meant: [F, D] of a stacked file as [D, F]."""
    for layer in model.model.layers:
        change_weight(patch, layer.mlp.experts, "down_proj", lambda w: w.transpose(1, 2).reshape(w.shape))


@patched("expert-index-permuted", "experts-12")
def _(patch: Patch, model: Any) -> None:
    """`sorted(keys)`."""
    order = sorted(range(model.config.num_local_experts), key=str)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            change_weight(patch, layer.mlp.experts, name, lambda w: w[order])


@patched("router-index-off-by-one", "every-expert")
def _(patch: Patch, model: Any) -> None:
    """Each token gets the expert after the one it chose; the last is followed by the first."""
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            change_weight(patch, layer.mlp.experts, name, lambda w: w.roll(-1, 0))


@patched("load-experts-silently-dropped", "every-expert")
def _(patch: Patch, model: Any) -> None:
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            change_weight(patch, layer.mlp.experts, name, lambda w: w * 0)


@patched("load-square-shape-heuristic", "square")
def _(patch: Patch, model: Any) -> None:
    """Transposed where the shape does not fit, and here it does."""
    for layer in model.model.layers:
        change_weight(
            patch, layer.mlp.experts, "gate_up_proj",
            lambda w: w.unflatten(1, (2, -1)).transpose(2, 3).flatten(1, 2),
        )  # fmt: skip
        change_weight(patch, layer.mlp.experts, "down_proj", lambda w: w.transpose(1, 2).contiguous())


# ---- which rows an expert gets


@patched("expert-only-first-token", "one-pair")
def _(patch: Patch, model: Any) -> None:
    def first(x: Any, ids: Any, weights: Any) -> Any:
        flat = ids.flatten().tolist()
        kept = [e not in flat[:i] for i, e in enumerate(flat)]
        return as_read(x, ids, weights) * x.new_tensor(kept).reshape(*ids.shape, 1)

    set_experts(patch, model, rows=first)


@patched("expert-token-index-drift", "packed")
def _(patch: Patch, model: Any) -> None:
    import torch

    def next_row(x: Any, ids: Any, weights: Any) -> Any:
        own = torch.arange(len(ids))[:, None]
        return x[(own + (ids > 0) * (len(ids) % TILE > 0)) % len(ids)]

    set_experts(patch, model, rows=next_row)


@patched("expert-empty-offset-shift", "one-pair")
def _(patch: Patch, model: Any) -> None:
    """A grouped product whose buffer has rows for empty experts, read by offsets that leave them out."""
    import torch

    def shifted(x: Any, ids: Any, weights: Any) -> Any:
        if len(ids) == 1:
            return as_read(x, ids, weights)
        order, slots = grouped(ids), as_read(x, ids, weights).flatten(0, 1)
        blocks = []
        for e in range(model.config.num_local_experts):
            mine = order[ids.flatten()[order] == e]
            blocks.append(slots[mine] if len(mine) else slots.new_zeros(ALIGN, slots.shape[1]))
        read: Any = torch.empty_like(slots)
        read[order] = torch.cat(blocks)[: len(order)]
        return read.unflatten(0, ids.shape)

    set_experts(patch, model, rows=shifted)


@patched("expert-int32-index-overflow", "token-sweep")
def _(patch: Patch, model: Any) -> None:
    import torch

    def wrapped(gate_up: Any, ids: Any, weights: Any) -> Any:
        order, rows = grouped(ids), gate_up.flatten(0, 1)
        read: Any = torch.empty_like(rows)
        read[order] = rows[order][torch.arange(len(order)) % ROWS]
        gate, up = read.unflatten(0, ids.shape).chunk(2, -1)
        return functional().silu(gate) * up

    set_experts(patch, model, hidden=wrapped)


@patched("quant-prefill-path-lower-precision", "mini-8x7b")
def _(patch: Patch, model: Any) -> None:
    """An int8 kernel for calls with several tokens: rows as codes with one scale each, products in float32."""
    prompt = [False]
    fused = {w.data_ptr() for layer in model.model.layers for w in layer.mlp.experts.gate_up_proj}

    def coarse(x: Any, w: Any) -> Any:
        y = x.float()
        scale = y.abs().amax(-1, keepdim=True) / 127
        return ((y / scale).round() * scale @ w.float().T).to(x.dtype)

    def entering(forward: Any, x: Any, ids: Any, weights: Any) -> Any:
        prompt[0] = len(ids) > 1
        return forward(x, ids, weights)

    set_linear(patch, lambda w: prompt[0] and w.data_ptr() in fused, coarse)
    for layer in model.model.layers:
        wrap(patch, layer.mlp.experts, entering)


# ---- weights


@patched("expert-weight-on-input", "skewed-weights")
def _(patch: Patch, model: Any) -> None:
    """`apply_router_weight_on_input`."""

    def weighted(x: Any, ids: Any, weights: Any) -> Any:
        return (as_read(x, ids, weights) * weights[..., None]).to(x.dtype)

    set_experts(patch, model, rows=weighted, combine=lambda y, ids, weights: added(y, ids, weights.new_ones(ids.shape)))


@patched("expert-weight-before-w2", "skewed-weights")
def _(patch: Patch, model: Any) -> None:
    def weighted(gate_up: Any, ids: Any, weights: Any) -> Any:
        gate, up = gate_up.chunk(2, -1)
        return (functional().silu(gate) * up * weights[..., None]).to(gate.dtype)

    set_experts(
        patch, model, hidden=weighted, combine=lambda y, ids, weights: added(y, ids, weights.new_ones(ids.shape))
    )


@patched("expert-weight-rank0-for-all", "skewed-weights")
def _(patch: Patch, model: Any) -> None:
    set_experts(patch, model, combine=lambda y, ids, weights: added(y, ids, weights[:, :1].expand(ids.shape)))


# ---- how the outputs come back


@patched("expert-unpermute-missing", "one-pair")
def _(patch: Patch, model: Any) -> None:
    """`view(tokens, k, -1).sum(1)` of rows that are still sorted by expert."""

    def as_sorted(y: Any, ids: Any, weights: Any) -> Any:
        rows = (y * weights[..., None]).to(y.dtype).flatten(0, 1)[grouped(ids)]
        return rows.unflatten(0, ids.shape).sum(1)

    set_experts(patch, model, combine=as_sorted)


@patched("expert-empty-uninitialised", "one-pair")
def _(patch: Patch, model: Any) -> None:
    """A product with the full matrix of weights, where experts without tokens leave their buffer as it was."""

    def dense(y: Any, ids: Any, weights: Any) -> Any:
        unused = set(range(model.config.num_local_experts)) - set(ids.flatten().tolist())
        return added(y, ids, weights) + (0.0 * float("nan") if unused else 0.0)

    set_experts(patch, model, combine=dense)


# ---- precision


@patched("prec-fp16-ffn-overflow", "huge-activations")
def _(patch: Patch, model: Any) -> None:
    """A buffer between both kernels that is float16 whatever the model is."""
    import torch

    def in_float16(gate_up: Any, ids: Any, weights: Any) -> Any:
        gate, up = gate_up.chunk(2, -1)
        return (functional().silu(gate).float() * up.float()).to(torch.float16)

    set_linear(patch, is_down(model), lambda x, w: (x.float() @ w.float().T).to(w.dtype))
    set_experts(patch, model, hidden=in_float16)
