# SPDX-License-Identifier: Apache-2.0
"""A quantised checkpoint in its simplest form: groups of 32 inputs share one scale.

int8 is symmetric, with codes from -127 to 127. fp8 is float8_e4m3, whose largest value is 448. The right engine is the
specification on the dequantised weights, code times scale in float64. Traces are verified against these weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.bugs.changed_weights import mapped
from refmoe.checkpoints.weight import Weight
from refmoe.spec.experts import Expert
from refmoe.spec.model import Layer, Parameters

GROUP = 32
"""Inputs that share a scale, as in GGUF's Q8_0 and in MX formats; the last group of a row may be shorter."""


@dataclass(frozen=True)
class Quantisation:
    """A dtype of codes.   largest: the code of the largest element of a group"""

    name: str
    largest: float
    encode: Callable[[Any], Any]


INT8 = Quantisation("int8", 127.0, lambda x: np.rint(x).astype(np.int8))
FP8 = Quantisation("fp8", 448.0, lambda x: x.astype(ml_dtypes.float8_e4m3fn))


@dataclass(frozen=True)
class Codes:
    """A quantised matrix. codes: [m, n]   scales: float32 [m, groups]"""

    codes: Any
    scales: Any

    def values(self) -> Any:
        """The dequantised matrix, float64 [m, n]. Each product is exact."""
        spread = np.repeat(self.scales, GROUP, axis=1)[:, : self.codes.shape[1]]
        return self.codes.astype(np.float64) * spread


def quantise(values: Any, to: Quantisation) -> Codes:
    """The codes and scales of a matrix. values: [m, n]"""
    values = np.asarray(values, np.float64)
    starts = range(0, values.shape[1], GROUP)
    largest = np.stack([np.abs(values[:, start : start + GROUP]).max(axis=1) for start in starts], axis=1)
    scales = (np.where(largest > 0, largest, 1.0) / to.largest).astype(np.float32)
    spread = np.repeat(scales, GROUP, axis=1)[:, : values.shape[1]]
    return Codes(to.encode(np.clip(values / spread, -to.largest, to.largest)), scales)


class QuantisedWeight(Weight):
    """A parameter that is stored as codes. Reading it gives the dequantised values."""

    def __init__(self, weight: Any, to: Quantisation) -> None:
        """weight: the parameter before it was quantised"""
        super().__init__(
            name=weight.name,
            shape=weight.shape,
            dtype=np.float64,
            source=lambda: self.stored().values(),
            origin=f"{weight.origin}, {to.name}",
        )
        self.quantisation = to
        self.stored: Callable[[], Codes] = lambda: quantise(weight.read(), to)


class SmoothedGain(Weight):
    """The gain of a norm, divided by factors. The weights that read the norm are multiplied by them."""

    def __init__(self, weight: Any, factors: Any) -> None:
        """factors: [D], powers of two, so that nothing is rounded"""
        super().__init__(
            name=weight.name,
            shape=weight.shape,
            dtype=weight.dtype,
            source=lambda: weight.read() / factors,
            origin=weight.origin,
        )
        self.factors = factors


def factors_of(width: int) -> Any:
    """Fixed factors of smoothing, 1, 2 and 1/2 in turn, as a calibration may find them. returns: [width]"""
    return np.resize(np.array([1.0, 2.0, 0.5], np.float32), width)


def smoothed(layer: Layer) -> Layer:
    """The layer with a smoothed norm before the experts. The router matrix and the experts are compensated."""

    def times(weight: Any) -> Weight:
        factors = factors_of(weight.shape[1])
        return mapped(weight, lambda values: values * factors)

    experts = tuple(replace(expert, w1=times(expert.w1), w3=times(expert.w3)) for expert in layer.experts)
    gain = SmoothedGain(layer.moe_norm, factors_of(layer.moe_norm.shape[0]))
    return replace(layer, moe_norm=gain, router=times(layer.router), experts=experts)


def quantised(parameters: Parameters, to: Quantisation) -> Parameters:
    """The parameters, smoothed and quantised: attention and experts, but not the router, norms, embedding and
    output."""

    def codes(layer: Layer) -> Layer:
        layer = smoothed(layer)
        experts = tuple(Expert(*(QuantisedWeight(w, to) for w in (e.w1, e.w2, e.w3))) for e in layer.experts)
        names = ("wq", "wk", "wv", "wo")
        return replace(layer, experts=experts, **{name: QuantisedWeight(getattr(layer, name), to) for name in names})

    return replace(parameters, layers=tuple(map(codes, parameters.layers)))
