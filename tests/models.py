# SPDX-License-Identifier: Apache-2.0
"""Small models for tests: nothing in them is a default, or half the mistakes would not show."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.checkpoints.names import build_parameters, parameter_shapes
from refmoe.checkpoints.weight import Weight
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters

SMALL = Config(
    dim=20, layers=2, heads=6, kv_heads=3, head_dim=8, hidden_dim=28, vocab=37, experts=5, experts_per_token=2,
    norm_eps=3e-5, rope_theta=3e4,
)  # fmt: skip


def random_parameters(config: Config, seed: int) -> Parameters:
    """Unit-scale embeddings, random gains, peaked attention; float64 throughout."""
    rng = np.random.default_rng(seed)
    shapes = parameter_shapes(config)

    def weight(name: str) -> Weight:
        shape = shapes[name]
        if len(shape) == 1:
            values = rng.uniform(0.5, 1.5, shape)
        elif name == "embedding":
            values = rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) * 1.7 / np.sqrt(shape[1])
        return Weight(name, shape, np.float64, lambda: values, name)

    return build_parameters(config, weight)


def random_model(config: Config = SMALL, seed: int = 1) -> Model:
    return Model(config, random_parameters(config, seed))


def relative_rms(found: Any, expected: Any) -> float:
    """Root mean square of the difference over that of the expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
