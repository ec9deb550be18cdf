# SPDX-License-Identifier: Apache-2.0
"""Faults of rotary embedding."""

from __future__ import annotations

from typing import Any

from tests.verifier.faults import SAME_BITS, Patch, fault, modeling, set_table

ROTATED = ("attention.q_rope", "attention.k_rope")


def angles(positions: Any, frequencies: Any) -> Any:
    import torch

    angle = positions[..., None] * frequencies
    return torch.cat((angle, angle), -1)


@fault("rope-interleaved", "dims-distinct", *ROTATED, why="weights of one layout turned in the other's pairs")
def _(patch: Patch, model: Any) -> None:
    def turn(x: Any, cos: Any, sin: Any) -> Any:
        import torch

        half = x.shape[-1] // 2
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    patch.setattr(modeling(), "apply_rotary_pos_emb", lambda q, k, c, s: (turn(q, c, s), turn(k, c, s)))


@fault("rope-sign", "dims-distinct", *ROTATED, why="turned clockwise")
def _(patch: Patch, model: Any) -> None:
    turn = modeling().apply_rotary_pos_emb
    patch.setattr(modeling(), "apply_rotary_pos_emb", lambda q, k, cos, sin: turn(q, k, cos, -sin))


@fault("rope-key-not-turned", "dims-distinct", "attention.k_rope", why="the result for keys dropped")
def _(patch: Patch, model: Any) -> None:
    turn = modeling().apply_rotary_pos_emb
    patch.setattr(modeling(), "apply_rotary_pos_emb", lambda q, k, cos, sin: (turn(q, k, cos, sin)[0], k))


def set_frequencies(patch: Patch, frequencies: Any) -> None:
    def table(x: Any, p: Any, _: Any) -> Any:
        angle = angles(p.float(), frequencies)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    set_table(patch, table)


@fault("rope-theta-1e4", "dims-distinct", *ROTATED, why="the default of older models, where the field is not read")
def _(patch: Patch, model: Any) -> None:
    import torch

    d = model.config.head_dim
    set_frequencies(patch, 1e4 ** -(torch.arange(0, d, 2).float() / d))


@fault("rope-frequencies-to-the-end", "head-dim-64", *ROTATED, why="linspace with both ends in the place of arange")
def _(patch: Patch, model: Any) -> None:
    import torch

    theta = model.config.rope_parameters["rope_theta"]
    set_frequencies(patch, theta ** -torch.linspace(0, 1, model.config.head_dim // 2))


@fault("rope-positions-from-one", "dims-distinct", *ROTATED, why="positions that count tokens up to their own")
def _(patch: Patch, model: Any) -> None:
    set_table(patch, lambda x, p, f: tuple(t.to(x.dtype) for t in (angles(p + 1, f).cos(), angles(p + 1, f).sin())))


@fault("rope-positions-restart", "walking-skeleton", *ROTATED, why="each call numbers its own tokens from 0")
def _(patch: Patch, model: Any) -> None:
    def table(x: Any, p: Any, f: Any) -> Any:
        angle = angles(p - p.min(), f)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    set_table(patch, table)


@fault("rope-angles-in-the-storage-type", "positions-32768", *ROTATED, why="positions cast with the model",
       unseen={"float32": SAME_BITS})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    def table(x: Any, p: Any, f: Any) -> Any:
        angle = angles(p.to(x.dtype), f.to(x.dtype))
        return angle.cos(), angle.sin()

    set_table(patch, table)


@fault("rope-positions-in-bfloat16", "positions-2048", *ROTATED, why="torch.arange in the dtype of the model")
def _(patch: Patch, model: Any) -> None:
    import torch

    def table(x: Any, p: Any, f: Any) -> Any:
        angle = angles(p.to(torch.bfloat16).float(), f)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    set_table(patch, table)


@fault("rope-table-in-bfloat16", "dims-distinct", *ROTATED, why="a table kept in bfloat16 and read as it is",
       unseen={"bfloat16": SAME_BITS})  # fmt: skip
def _(patch: Patch, model: Any) -> None:
    import torch

    def table(x: Any, p: Any, f: Any) -> Any:
        angle = angles(p.float(), f)
        return tuple(t.to(torch.bfloat16).to(x.dtype) for t in (angle.cos(), angle.sin()))

    set_table(patch, table)


@fault("rope-turns-values", "dims-distinct", "attention.context", why="a fused projection turned as a whole")
def _(patch: Patch, model: Any) -> None:
    from transformers import DynamicCache

    turn, update, kept = modeling().apply_rotary_pos_emb, DynamicCache.update, {}

    def turned(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        kept["table"] = cos, sin
        return turn(q, k, cos, sin)

    def updated(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        return update(self, keys, turn(values, values, *kept["table"])[0], *args, **kwargs)

    patch.setattr(modeling(), "apply_rotary_pos_emb", turned)
    patch.setattr(DynamicCache, "update", updated)
