# SPDX-License-Identifier: Apache-2.0
"""Faults of the cache."""

from __future__ import annotations

from typing import Any

from tests.verifier.faults import ATTENDED, Patch, fault, modeling, set_cache


@fault("cache-writes-one-slot-early", "walking-skeleton", *ATTENDED, why="an index from 1 where 0 was meant")
def _(patch: Patch, model: Any) -> None:
    import torch

    def early(x: Any, past: int) -> Any:
        if not past:
            return x
        return torch.cat((x[:, :, : past - 1], x[:, :, past:], torch.zeros_like(x[:, :, :1])), 2)

    set_cache(patch, early)


@fault("cache-drops-the-oldest", "dims-distinct", *ATTENDED, why="a ring one slot too small")
def _(patch: Patch, model: Any) -> None:
    import torch

    def drop(x: Any, past: int) -> Any:
        return torch.cat((torch.zeros_like(x[:, :, :1]), x[:, :, 1:]), 2) if past else x

    set_cache(patch, drop)


@fault(
    "cache-turned-again", "walking-skeleton", "attention.probs", why="keys cached before rotation turned with each call"
)
def _(patch: Patch, model: Any) -> None:
    import torch

    kept = {}
    turn = modeling().apply_rotary_pos_emb

    def turned(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        kept["table"] = cos[:, :1], sin[:, :1]
        return turn(q, k, cos, sin)

    def again(x: Any, past: int) -> Any:
        return torch.cat((turn(x[:, :, :past], x[:, :, :past], *kept["table"])[0], x[:, :, past:]), 2) if past else x

    patch.setattr(modeling(), "apply_rotary_pos_emb", turned)
    set_cache(patch, again, values_too=False)


@fault("cache-shared-by-layers", "walking-skeleton", "attention.context", why="one buffer of values for every layer")
def _(patch: Patch, model: Any) -> None:
    from transformers import DynamicCache

    update = DynamicCache.update

    def shared(self: Any, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, keys, values, layer, *args, **kwargs)
        return keys, values if layer == 0 else self.layers[0].values

    patch.setattr(DynamicCache, "update", shared)


@fault("cache-in-float8", "dims-distinct", *ATTENDED, why="a quantised cache, declared nowhere")
def _(patch: Patch, model: Any) -> None:
    import torch

    set_cache(patch, lambda x, _: x.to(torch.float8_e4m3fn).to(x.dtype))
