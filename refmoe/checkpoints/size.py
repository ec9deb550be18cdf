# SPDX-License-Identifier: Apache-2.0
"""The number of parameters of a model, and of those that one token uses, derived from the shapes."""

from __future__ import annotations

import math

from refmoe.checkpoints.names import parameter_shapes
from refmoe.spec.config import Config


def total_parameters(config: Config) -> int:
    """The number of elements of all parameters."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def active_parameters(config: Config) -> int:
    """The number of elements that one token uses: all but those of the experts that it does not choose."""
    idle = config.experts - config.experts_per_token
    return total_parameters(config) - config.layers * idle * 3 * config.dim * config.hidden_dim
