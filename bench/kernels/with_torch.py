# SPDX-License-Identifier: Apache-2.0
"""A layer of experts in PyTorch: rows grouped by expert, gate and up in one product."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

MISTAKES = ("", "exchanged", "neighbour", "last token", "bfloat16 sum")


def moe(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
    mistake: str = "",
) -> torch.Tensor:  # fmt: skip
    """x: [T, D]   gate_up: [E, 2 F, D]   down: [E, D, F]   ids, weights: [T, k]   returns: [T, D]"""
    result = torch.zeros(x.shape, dtype=torch.bfloat16 if mistake == "bfloat16 sum" else torch.float32)
    for expert in ids.unique().tolist():
        token, slot = torch.where(ids == expert)
        if mistake == "last token" and len(token) > 1:  # an upper bound that is one too small
            token, slot = token[:-1], slot[:-1]
        w = (expert + 1) % len(down) if mistake == "neighbour" else expert
        gate, up = (x[token] @ gate_up[w].T).chunk(2, dim=1)
        hidden = silu(up) * gate if mistake == "exchanged" else silu(gate) * up
        outputs = (hidden @ down[w].T) * weights[token, slot, None].to(x.dtype)
        result.index_add_(0, token, outputs.to(result.dtype))
    return result.to(x.dtype)
