# SPDX-License-Identifier: Apache-2.0
"""Bugs that add up the products of codes in too coarse an accumulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from refmoe.arithmetic.codes import Codes, Factors, InputFormat
from refmoe.arithmetic.formats import FLOAT16, FLOAT32, Format, nearest, ulp
from refmoe.bugs.mutant import POLICY
from refmoe.bugs.quantised.bug import register
from refmoe.bugs.quantised.inputs import ALL, BLOCKS
from refmoe.profiles.policy import Policy

TOGETHER = 32
"""The terms whose sum reaches an accumulator at once, as kernels add up integers."""
FOURTEEN_BITS = Format(name="fourteen bits", precision=14, exponent_min=-126, exponent_max=127)
"""The accumulator of FP8 tensor cores of NVIDIA's Hopper: 13 bits of fraction."""


@dataclass(frozen=True)
class CoarseSums(InputFormat):
    """Codes whose products are added up in another dtype than float32, 32 terms at a time, in order."""

    accumulator: Format = FLOAT32

    def depth(self, terms: int) -> int:
        """In roundings of float32, of which one of the accumulator counts as many."""
        return (-(-terms // TOGETHER) + 2) * int(self.accumulator.u / FLOAT32.u) + super().depth(terms)


def added_up(codes: Codes, groups: int, factors: Factors, how: CoarseSums) -> tuple[Any, Any]:
    """The sums of the products of all blocks and offsets, each partial sum rounded to the accumulator: [t, m].

    returns: the sums, and the variance of their error for any engine that adds up so
    """
    rows, height = len(codes.codes), len(factors.terms)
    left, right = codes.values.reshape(rows, -1, TOGETHER), factors.terms.reshape(height, -1, TOGETHER)
    sums = codes.sums(groups) if groups else np.zeros((rows, 0))
    total = variance = np.zeros((rows, height))
    for step in range(left.shape[1] + sums.shape[1]):
        if step < left.shape[1]:
            term = left[:, step] @ right[:, step].T.astype(np.float64)
        else:
            term = np.outer(sums[:, step - left.shape[1]], factors.offsets[:, step - left.shape[1]])
        total = nearest(total + term, how.accumulator)
        variance = variance + ulp(total, how.accumulator) ** 2 / 12
    return total, variance


def coarse(accumulator: Format) -> Callable[[Policy], Policy]:
    """The change of a policy that adds up in this dtype."""

    def function(policy: Policy) -> Policy:
        inputs = {
            name: CoarseSums(
                **{each.name: getattr(how, each.name) for each in fields(InputFormat)}, accumulator=accumulator
            )
            if isinstance(how, InputFormat)
            else how
            for name, how in policy.inputs.items()
        }
        return replace(policy, inputs=inputs)

    return function


register(
    "quantised-sums-in-float16", POLICY, coarse(FLOAT16),
    "The products of blocks are added up in float16, whose sums have eleven bits.", formats=ALL,
    fix="keep the sums of blocks in float32", by_size=True,
    sources=["ggml-org/llama.cpp/pull/13607", "ggml-org/llama.cpp/pull/15619"],
)  # fmt: skip
register(
    "quantised-sums-never-promoted", POLICY, coarse(FOURTEEN_BITS),
    "All sums stay in the accumulator of a tensor core, of fourteen bits. They are to be moved to float32 at times.",
    formats=BLOCKS, fix="add the sums of each 128 terms up in float32", by_size=True,
    sources=["deepseek-ai/DeepGEMM/issues/50", "deepseek-ai/DeepGEMM/issues/37", "NVIDIA/cutlass/pull/3149"],
)  # fmt: skip
