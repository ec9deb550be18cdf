"""Parameters as a wrong loader leaves them: each is computed from the right one when it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from refmoe.checkpoints.weight import Weight
from refmoe.spec.experts import Expert
from refmoe.spec.model import Layer, Parameters

Values = Any
"""A NumPy array in the stored dtype."""


def mapped(weight: Any, change: Callable[[Values], Values], shape: tuple[int, ...] | None = None) -> Weight:
    """The weight as `change` leaves its values.   shape: the new one, where it is another"""
    return Weight(
        weight.name, shape or weight.shape, weight.dtype, lambda: change(weight.read()), f"{weight.origin}, changed"
    )


def with_layers(parameters: Parameters, change: Callable[[Layer], Layer]) -> Parameters:
    """Each layer as `change` leaves it."""
    return replace(parameters, layers=tuple(map(change, parameters.layers)))


def with_experts(parameters: Parameters, change: Callable[[Expert], Expert]) -> Parameters:
    """Each expert of each layer as `change` leaves it."""
    return with_layers(parameters, lambda layer: replace(layer, experts=tuple(map(change, layer.experts))))
