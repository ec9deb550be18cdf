# SPDX-License-Identifier: Apache-2.0
"""Bugs of the mask, the heads and the cache, patched into transformers."""

from __future__ import annotations

from typing import Any

from tests.bugs.patched import Served, attend, attend_to_more, patched, set_eager, set_mask
from tests.verifier.engines import model_named
from tests.verifier.faults import Patch, change_weight, modeling

PAGE = 4
"""Tokens to a page of the cache."""
PAD = 2
"""The id that pads: that of </s>."""

# ---- mask


@patched("attn-causal-strict", "walking-skeleton")
def _(patch: Patch, model: Any) -> None:
    """`<` for `<=`; the first token of all keeps itself."""
    import torch

    def strict(visible: Any, _: Any) -> Any:
        rows = torch.arange(len(visible))
        earlier = visible.clone()
        earlier[rows, rows - len(rows)] = False
        return earlier | (visible & ~earlier.any(-1, keepdim=True))

    set_mask(patch, strict)


@patched("attn-causal-top-left", "window-chunks")
def _(patch: Patch, model: Any) -> None:
    """`is_causal` of a kernel that aligns at the top left, used for every call with more than one token."""
    import torch

    def aligned(visible: Any, _: Any) -> Any:
        if len(visible) == 1:
            return visible
        shown, window = torch.ones_like(visible).tril(), model.config.sliding_window
        return shown if window is None else shown & ~shown.tril(-window)

    set_mask(patch, aligned)


@patched("attn-swa-dropped-in-one-backend", "window-chunks")
def _(patch: Patch, model: Any) -> None:
    windowed = modeling().create_sliding_window_causal_mask

    def make(**kwargs: Any) -> Any:
        prompt = kwargs["inputs_embeds"].shape[1] > 1
        return (modeling().create_causal_mask if prompt else windowed)(**kwargs)

    patch.setattr(modeling(), "create_sliding_window_causal_mask", make)


@patched("attn-window-none-as-zero", "walking-skeleton")
def _(patch: Patch, model: Any) -> None:
    """`window or 0` beside the query's own: a window of one."""
    patch.setattr(model.config, "sliding_window", model.config.sliding_window or 1)


@patched("attn-mask-polarity-inverted", "batch-ragged")
def _(patch: Patch, model: Any) -> None:
    set_mask(patch, lambda visible, _: ~visible)


@patched("gen-pad-eq-eos", "edge-tokens")
def _(patch: Patch, model: Any) -> None:
    """`attention_mask = ids != pad`, where ids that end a text pad it too."""
    import torch

    served = Served(patch, model)
    seen: dict[int, Any] = {}

    def without_padding(visible: Any, cache: Any) -> Any:
        seen[id(cache)] = torch.cat((*([seen[id(cache)]] if id(cache) in seen else []), served.ids))
        kept = visible & (seen[id(cache)] != PAD)
        return kept | (visible & ~kept.any(-1, keepdim=True))

    set_mask(patch, without_padding)


# ---- heads


@patched("attn-gqa-index-by-nkv", "dims-distinct")
def _(patch: Patch, model: Any) -> None:
    """`head // num_key_value_heads`, and a buffer that ends with the last."""
    import torch

    def repeated(x: Any, n: int) -> Any:
        heads = x.shape[1]
        return x[:, (torch.arange(heads * n) // heads).clamp(max=heads - 1)]

    patch.setattr(modeling(), "repeat_kv", repeated)


@patched("attn-wo-head-order", "dims-distinct")
def _(patch: Patch, model: Any) -> None:
    """Columns of a checkpoint whose groups come second: head h there is member h // K of the group h % K."""
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        change_weight(
            patch, layer.self_attn.o_proj, "weight",
            lambda w: w.unflatten(1, (groups, heads // groups, -1)).transpose(1, 2).flatten(1),
        )  # fmt: skip


# ---- padding and batches


@patched("attn-fully-masked-row-nan", "batch-ragged", elsewhere=False)
def _(patch: Patch, model: Any) -> None:
    """A batch with padding on the left, where -inf hides: what the padding itself computes is NaN after a layer."""
    served = Served(patch, model)
    prompts = {run.sequence: len(run.tokens) for run in model_named("batch-ragged").runs if not run.past}

    def padded(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> tuple[Any, Any]:
        missing = max(prompts.values()) - prompts[served.row]
        slots = k.new_full((1, k.shape[1], missing, k.shape[3]), float("nan") if module.layer_idx else 1.0)
        return attend_to_more(q, k, v, mask, scaling, module.num_key_value_groups, (slots, slots), hidden=True)

    set_eager(patch, padded)


# ---- slots of the cache


def set_slots(patch: Patch, more: Any) -> None:
    """Attention over slots beyond the tokens.   more(k, v, T) returns their keys and values, or None"""

    def over(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> tuple[Any, Any]:
        slots, repeats = more(k, v, q.shape[2]), module.num_key_value_groups
        if slots is None:
            return attend(q, k, v, mask, scaling, repeats)
        return attend_to_more(q, k, v, mask, scaling, repeats, slots)

    set_eager(patch, over)


@patched("cache-write-hole", "shared-prefix")
def _(patch: Patch, model: Any) -> None:
    """Decoding writes at length + 1: one slot between prompt and answer stays cleared, and is attended to."""

    def hole(k: Any, v: Any, new: int) -> Any:
        return (k.new_zeros(k[:, :, :1].shape),) * 2 if new == 1 < k.shape[2] else None

    set_slots(patch, hole)


@patched("cache-length-rounded-up", "one-shot-chunked-stepwise")
def _(patch: Patch, model: Any) -> None:
    """`length // page + 1` pages; the one too many holds what a request with the same beginning left in it."""

    def page(k: Any, v: Any, new: int) -> Any:
        return (k[:, :, :PAGE], v[:, :, :PAGE]) if new == 1 and k.shape[2] % PAGE == 0 else None

    set_slots(patch, page)


@patched("cache-stale-tail-after-trim", "shared-prefix")
def _(patch: Patch, model: Any) -> None:
    """`crop` sets a length and attention reads the whole buffer."""
    import torch
    from transformers.cache_utils import DynamicLayer

    crop, update = DynamicLayer.crop, DynamicLayer.update
    current: dict[str, Any] = {}

    def cropped(layer: Any, count: int) -> None:
        before = layer.keys, layer.values
        crop(layer, count)
        cut = [whole[:, :, layer.keys.shape[2] :] for whole in before]
        tails = cut if layer.tail is None else zip(cut, layer.tail, strict=True)
        layer.tail = [tail if layer.tail is None else torch.cat(tail, 2) for tail in tails]

    def updated(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(layer, keys, values, *args, **kwargs)
        if layer.tail is not None:
            layer.tail = [tail[:, :, keys.shape[2] :] for tail in layer.tail]
        current["tail"] = None if layer.tail is None or not layer.tail[0].shape[2] else layer.tail
        return found

    patch.setattr(DynamicLayer, "tail", None, raising=False)
    patch.setattr(DynamicLayer, "crop", cropped)
    patch.setattr(DynamicLayer, "update", updated)
    set_slots(patch, lambda k, v, new: current["tail"])


# ---- a cache that has a window, and one that is filled in pieces


@patched("cache-window-update-at-boundary", "window-decode")
def _(patch: Patch, model: Any) -> None:
    """`length + new >= window` rolls: the step that just fills the window loses its oldest token."""

    def rolled(visible: Any, _: Any) -> Any:
        if visible.shape == (1, model.config.sliding_window):
            visible[:, 0] = False
        return visible

    set_mask(patch, rolled)


@patched("cache-chunk-larger-than-window", "window-chunks")
def _(patch: Patch, model: Any) -> None:
    """A ring of two windows takes a whole piece before any of it attends."""
    import torch

    def ringed(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float) -> tuple[Any, Any]:
        new, length, size = q.shape[2], k.shape[2], 2 * model.config.sliding_window
        if new > model.config.sliding_window and length > new:
            ring = torch.zeros(size, dtype=torch.long)
            for slot in range(length):
                ring[slot % size] = slot
            held = ring[torch.arange(length) % size]
            k, v = k[:, :, held], v[:, :, held]
        return attend(q, k, v, mask, scaling, module.num_key_value_groups)

    set_eager(patch, ringed)


@patched("cache-prefill-skips-tokens", "one-shot-chunked-stepwise")
def _(patch: Patch, model: Any) -> None:
    """Each later piece of a prompt leaves its last token out of the cache."""
    lost: dict[int, list[int]] = {}

    def skipped(visible: Any, cache: Any) -> Any:
        new, length = visible.shape
        visible[:, lost.get(id(cache), [])] = False
        if 1 < new < length:
            lost.setdefault(id(cache), []).append(length - 1)
        return visible

    set_mask(patch, skipped)
