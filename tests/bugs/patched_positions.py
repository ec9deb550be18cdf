# SPDX-License-Identifier: Apache-2.0
"""Bugs of rotary positions, patched into transformers."""

from __future__ import annotations

from typing import Any

from tests.bugs.patched import Served, patched
from tests.verifier.faults import Patch, modeling, set_table
from tests.verifier.faults_of_rope import angles, set_frequencies

TABLE = 4096
SCALE = 8


def set_positions(patch: Patch, change: Any) -> None:
    """The positions that the table is made of.   change(positions [1, T])"""

    def table(x: Any, p: Any, f: Any) -> Any:
        angle = angles(change(p).float(), f)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    set_table(patch, table)


@patched("rope-table-too-short", "positions-4096")
def _(patch: Patch, model: Any) -> None:
    set_positions(patch, lambda p: p.clamp(max=TABLE - 1))


@patched("rope-unwanted-scaling", "head-dim-64")
def _(patch: Patch, model: Any) -> None:
    """`rope_type` linear with the factor of another model's file."""
    set_frequencies(patch, model.model.rotary_emb.inv_freq / SCALE)


@patched("rope-decode-position-plus-one", "window-decode")
def _(patch: Patch, model: Any) -> None:
    """The length of the sequence after the token was counted."""
    set_positions(patch, lambda p: p + 1 if p.shape[-1] == 1 and p.item() > 0 else p)


@patched("rope-offset-from-kept-rows", "window-decode")
def _(patch: Patch, model: Any) -> None:
    """The number of rows in a cache that keeps a window, itself counted, is taken for the position."""
    kept = model.config.sliding_window

    def rows(p: Any) -> Any:
        return p.clamp(max=kept) if p.shape[-1] == 1 else p

    set_positions(patch, rows)


@patched("rope-reapplied-to-cache", "one-shot-chunked-stepwise")
def _(patch: Patch, model: Any) -> None:
    """Cached keys and new ones are turned in one call, and both are kept."""
    import torch
    from transformers.cache_utils import DynamicLayer

    turn, update = modeling().apply_rotary_pos_emb, DynamicLayer.update
    now: dict[str, Any] = {}

    def turned(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        now["table"] = cos, sin
        return turn(q, k, cos, sin)

    def again(layer: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.table is None:
            layer.table = now["table"]
        else:
            layer.keys = turn(layer.keys, layer.keys, *layer.table)[0]
            layer.table = [torch.cat(parts, 1) for parts in zip(layer.table, now["table"], strict=True)]
        return update(layer, keys, values, *args, **kwargs)

    patch.setattr(modeling(), "apply_rotary_pos_emb", turned)
    patch.setattr(DynamicLayer, "table", None, raising=False)
    patch.setattr(DynamicLayer, "update", again)


@patched("rope-batch-row0-only", "batch-ragged")
def _(patch: Patch, model: Any) -> None:
    """The kernel for one token a sequence writes the first row of the batch; the buffer of the others stays cleared."""
    served, turn = Served(patch, model), modeling().apply_rotary_pos_emb

    def first_row(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q, k = turn(q, k, cos, sin)
        return (q * 0, k * 0) if served.row and q.shape[2] == 1 else (q, k)

    patch.setattr(modeling(), "apply_rotary_pos_emb", first_row)
