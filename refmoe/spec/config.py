"""The configuration: every number that the model depends on, and the two published sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


class ConfigError(ValueError):
    """A configuration that is not a Mixtral; the message names the field, its value and the reason."""


@dataclass(frozen=True)
class Config:
    """The dimensions and constants of one model.

    CONFIG-1  Every dimension is free; head_dim is independent of dim / heads.
    CONFIG-2  heads is a multiple of kv_heads: each key/value head serves heads / kv_heads query heads.
    CONFIG-3  head_dim is even: rotary embedding turns pairs.
    CONFIG-4  1 <= experts_per_token <= experts.
    CONFIG-5  window is None (attend to everything before) or at least 1, the token itself counted.

    Raises ConfigError. Jiang et al. 2024, table 1.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("norm_eps", "rope_theta"):
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise ConfigError(f"{field.name} = {value!r}, but a finite number was expected")
            elif not (field.name == "window" and value is None):
                if isinstance(value, bool) or not isinstance(value, int):
                    raise ConfigError(f"{field.name} = {value!r}, but an integer was expected")
                if value < 1:
                    raise ConfigError(f"{field.name} = {value}, but at least 1 was expected")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}: "
                "each key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim = {self.head_dim} is odd, but rotary embedding turns pairs of elements")
        if self.experts_per_token > self.experts:
            raise ConfigError(
                f"experts_per_token = {self.experts_per_token} exceeds experts = {self.experts}: "
                "a token cannot choose more experts than there are"
            )
        if self.norm_eps < 0:
            raise ConfigError(f"norm_eps = {self.norm_eps!r} is negative, but it is added under a square root")
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta = {self.rope_theta!r}, but a positive base of powers was expected")


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
