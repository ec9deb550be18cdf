# SPDX-License-Identifier: Apache-2.0
"""Bugs that add up the products of codes in too coarse an accumulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from refmoe.arithmetic.codes import InputFormat
from refmoe.arithmetic.formats import FLOAT16, Format
from refmoe.bugs.mutant import POLICY
from refmoe.bugs.quantised.bug import register
from refmoe.bugs.quantised.coarse_sums import CoarseSums
from refmoe.bugs.quantised.folders import FP8
from refmoe.bugs.quantised.inputs import ALL, BLOCKS
from refmoe.profiles.policy import Policy

FOURTEEN_BITS = Format(name="fourteen bits", precision=14, exponent_min=-126, exponent_max=127)
"""The accumulator of FP8 tensor cores of NVIDIA's Hopper: 13 bits of fraction."""


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
register(
    "quantised-fp8-sums-never-promoted", POLICY, coarse(FOURTEEN_BITS),
    "Sums of FP8 products stay in the accumulator of a tensor core, of fourteen bits, and never move to float32.",
    formats=FP8, fix="add the sums of each 128 terms up in float32", by_size=True,
    sources=["deepseek-ai/DeepGEMM/issues/50", "deepseek-ai/DeepGEMM/issues/37", "NVIDIA/cutlass/pull/3149"],
)  # fmt: skip
