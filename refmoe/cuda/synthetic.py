# SPDX-License-Identifier: Apache-2.0
"""Synthetic weights computed on a device: the formula of `refmoe.checkpoints.weight_formula`, bit for bit.

A device computes all weights of a large model in seconds, while sending them to it would take minutes.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.checkpoints.names import build_parameters, named_weights
from refmoe.checkpoints.synthetic import SyntheticWeight
from refmoe.checkpoints.weight_formula import GOLDEN_RATIO, stream_key
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

BLOCK = 1 << 24
"""Elements hashed at a time: some hundred megabytes of temporaries."""


def elements(xp: Any, seed: int, name: str, exponent: int, count: int) -> Array:
    """The first elements of a matrix in row-major order: float32 [count]."""
    result, key = xp.empty(count, np.float32), np.uint64(stream_key(seed, name))
    for first in range(0, count, BLOCK):
        stop = min(first + BLOCK, count)
        z = xp.arange(first + 1, stop + 1, dtype=np.uint64)
        z *= np.uint64(GOLDEN_RATIO)
        z += key
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        top = (z >> np.uint64(56)).astype(np.float32)  # the last xor of the finaliser does not reach the top byte
        top -= np.float32(127.5)
        top *= np.float32(math.ldexp(1, exponent + 1))
        result[first:stop] = top
    return result


class DeviceSyntheticWeight(SyntheticWeight):
    """A parameter whose `read` gives an array on the device; rows of a table come from the host's formula."""

    def __init__(self, weight: SyntheticWeight, xp: Any, dtype: str = "float32") -> None:
        """dtype: float32, or bfloat16, which also holds every element exactly."""
        super().__init__(
            seed=weight.seed, name=weight.name, shape=weight.shape, exponent=weight.exponent, edits=weight.edits
        )
        self._xp, self._kept = xp, dtype

    def read(self) -> Array:
        if self.edits or len(self.shape) == 1:
            return self._narrow(self._xp.asarray(super().read()))
        count = math.prod(self.shape)
        return self._narrow(elements(self._xp, self.seed, self.name, self.exponent, count)).reshape(self.shape)

    def _narrow(self, values: Array) -> Array:
        if self._kept == "float32":
            return values
        # the lower halves are zero
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(ml_dtypes.bfloat16)


def on_device(config: Config, parameters: Parameters, xp: Any, dtype: str = "float32") -> Parameters:
    """The parameters, with synthetic weights computed on the device."""
    named = named_weights(parameters)

    def weight(name: str) -> Any:
        found = named[name]
        return DeviceSyntheticWeight(found, xp, dtype) if isinstance(found, SyntheticWeight) else found

    return build_parameters(config, weight)
