# SPDX-License-Identifier: Apache-2.0
"""Tensor cores that align terms and cut them off: their description as data, and the bits that they compute.

A step adds a few products to the sum so far. All terms are aligned to the largest exponent among them, and cut off
some bits below it. Their sum is exact. It is then cut off too. The exponent of a product is that of its two factors
added, before the product is normalised. The models are those of Xie et al. 2025, arXiv 2511.10909, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, FLOAT32, Format, nearest

E4M3 = Format("float8_e4m3fn", 4, -6, 8)
E5M2 = Format("float8_e5m2", 3, -14, 15)
TF32 = Format("tf32", 11, -126, 127)
NOTHING = -4096
"""The exponent of zero: below that of every other number."""


@dataclass(frozen=True)
class TensorCore:
    """One arithmetic of one architecture."""

    inputs: Format
    """The format of the factors."""
    aligned: int
    """The bits that each term of a step keeps below the leading bit of the largest one."""
    terms: int
    """The products that a step sums."""
    kept: int = FLOAT32.precision - 1
    """The bits that the sum keeps below its leading bit after a step."""
    promoted: int | None = None
    """The products after which the sum is added to another one in float32, and starts anew. None: it never is."""

    def steps(self, count: int) -> int:
        """The steps that sum this many products without a gap."""
        return math.ceil(count / self.terms)

    def chain(self, count: int) -> int:
        """The most products, of this many, that are summed in the tensor core before a promotion."""
        return count if self.promoted is None else min(self.promoted, count)

    def run(self, x: Any, w: Any) -> Any:
        """The product of x [l, n] and w [n, m], summed in the order of the index.

        x, w: float64 with values of `inputs`   returns: float64 [l, m] with float32 values
        """
        n = x.shape[1]
        chain = max(self.chain(n), 1)
        total = np.zeros((len(x), w.shape[1]))
        for start in range(0, n, chain):
            part = slice(start, start + chain)
            total = nearest(total + self._chain(x[:, part], w[part]), FLOAT32)
        return total

    def _chain(self, x: Any, w: Any) -> Any:
        exponents_x, exponents_w = exponents(x, self.inputs), exponents(w, self.inputs)
        total = np.zeros((len(x), w.shape[1]))
        for start in range(0, x.shape[1], self.terms):
            part = slice(start, start + self.terms)
            products = x.T[part, :, None] * w[part, None, :]
            powers = exponents_x.T[part, :, None] + exponents_w[part, None, :]
            total = self._step(total, products, powers)
        return total

    def _step(self, total: Any, products: Any, powers: Any) -> Any:
        """total: [l, m]   products, powers: [terms, l, m]"""
        own = exponents(total, FLOAT32)
        top = np.maximum(powers.max(0), own)
        unit = np.ldexp(1.0, np.maximum(top, FLOAT32.exponent_min) - self.aligned)
        result = (np.trunc(products / unit).sum(0) + np.trunc(total / unit)) * unit
        unit = np.ldexp(1.0, np.maximum(exponents(result, FLOAT32), FLOAT32.exponent_min) - self.kept)
        cut: Any = np.trunc(result / unit) * unit
        return cut


def exponents(values: Any, format: Format) -> Any:
    """The exponents of values as the format holds them: one for all subnormal values, `NOTHING` for zero."""
    powers = np.maximum(np.frexp(values)[1] - 1, format.exponent_min)
    return np.where(values == 0, NOTHING, powers)


_HOPPER = TensorCore(E4M3, aligned=13, terms=32, kept=13)
TENSOR_CORES = {
    "volta-float16": TensorCore(FLOAT16, aligned=23, terms=4),
    "turing-float16": TensorCore(FLOAT16, aligned=24, terms=8),
    "ampere-float16": TensorCore(FLOAT16, aligned=24, terms=8),
    "ampere-bfloat16": TensorCore(BFLOAT16, aligned=24, terms=8),
    "ampere-tf32": TensorCore(TF32, aligned=24, terms=4),
    "hopper-float16": TensorCore(FLOAT16, aligned=25, terms=16),
    "hopper-bfloat16": TensorCore(BFLOAT16, aligned=25, terms=16),
    "hopper-tf32": TensorCore(TF32, aligned=25, terms=8),
    "ada-fp8": TensorCore(E4M3, aligned=13, terms=16, kept=13),
    "hopper-fp8-fast": _HOPPER,
    "hopper-fp8": replace(_HOPPER, promoted=128),
    "blackwell-fp8": TensorCore(E4M3, aligned=25, terms=32),
}
"""The tensor cores of NVIDIA by architecture and format. The sums of fast FP8 products are never promoted."""
