# SPDX-License-Identifier: Apache-2.0
"""The configuration: every number that the model depends on, and the two published sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """The dimensions and constants of one model.

    CONFIG-1  Every dimension is free; head_dim is independent of dim / heads.
    CONFIG-2  heads is a multiple of kv_heads: each key/value head serves heads / kv_heads query heads.
    CONFIG-3  head_dim is even: rotary embedding turns pairs.
    CONFIG-4  1 <= experts_per_token <= experts.
    CONFIG-5  window is None (attend to everything before) or at least 1, the token itself counted.

    Nothing is checked here: a configuration that breaks a clause is refused where it is read.
    Jiang et al. 2024, table 1.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab: int
    experts: int
    experts_per_token: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    window: int | None = None
    context: int = 32768
    """The longest sequence the model was trained for; information only, the spec computes any position."""


PRESETS = {
    "mixtral-8x7b": Config(
        dim=4096, layers=32, heads=32, kv_heads=8, head_dim=128, hidden_dim=14336,
        vocab=32000, experts=8, experts_per_token=2, context=32768,
    ),
    "mixtral-8x22b": Config(
        dim=6144, layers=56, heads=48, kv_heads=8, head_dim=128, hidden_dim=16384,
        vocab=32768, experts=8, experts_per_token=2, context=65536,
    ),
}  # fmt: skip
"""The published sizes. 8x7B: Jiang et al. 2024, table 1; 8x22B: params.json of Mixtral-8x22B-v0.3."""
