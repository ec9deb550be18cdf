# SPDX-License-Identifier: Apache-2.0
"""The number of parameters of a model, and of those that one token uses, derived from the shapes."""

from __future__ import annotations

import math

from refmoe.checkpoints.names import parameter_shapes
from refmoe.spec.config import Config


def total_parameters(config: Config, tied: bool = False) -> int:
    """The number of elements of all parameters.   tied: whether the output matrix is the embedding, counted once"""
    shapes = parameter_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes.items() if not (tied and name == "output"))


def active_parameters(config: Config, tied: bool = False) -> int:
    """The number of elements that one token uses: all but those of the experts that it does not choose."""
    idle = config.experts - config.experts_per_token
    return total_parameters(config, tied) - config.layers * idle * 3 * config.dim * config.hidden_dim
