# SPDX-License-Identifier: Apache-2.0
"""Parameters as a wrong loader leaves them. A changed weight is computed from the right one when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.checkpoints.weight import Weight
from refmoe.spec.experts import Expert
from refmoe.spec.model import Layer, Parameters

Values = np.ndarray[Any, Any]
"""An array in the stored dtype."""


def mapped(weight: Any, change: Callable[[Values], Values], shape: tuple[int, ...] | None = None) -> Weight:
    """The weight with its values changed.   shape: the new shape, if it differs"""
    return Weight(
        name=weight.name,
        shape=shape or weight.shape,
        dtype=weight.dtype,
        source=lambda: change(weight.read()),
        origin=f"{weight.origin}, changed",
    )


def with_layers(parameters: Parameters, change: Callable[[Layer], Layer]) -> Parameters:
    """The parameters with every layer changed."""
    return replace(parameters, layers=tuple(map(change, parameters.layers)))


def with_experts(parameters: Parameters, change: Callable[[Expert], Expert]) -> Parameters:
    """The parameters with every expert of every layer changed."""
    return with_layers(parameters, lambda layer: replace(layer, experts=tuple(map(change, layer.experts))))
