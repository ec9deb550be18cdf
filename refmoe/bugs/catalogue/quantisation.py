# SPDX-License-Identifier: Apache-2.0
"""Bugs of quantised engines. The specification is run on the dequantised weights: see
`refmoe.bugs.quantised_checkpoint`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.bugs.catalogue.loading import interleaved
from refmoe.bugs.changed_weights import mapped, with_experts, with_layers
from refmoe.bugs.mutant import PARAMETERS, mutant
from refmoe.bugs.quantised_checkpoint import Codes, QuantisedWeight, SmoothedGain, quantise
from refmoe.spec.config import Config
from refmoe.spec.model import Layer, Parameters
from refmoe.steps.rounding import run_experts as right_experts


@mutant(
    "quant-router-quantised", breaks=["ROUTE-1"], touches=["router.logits"], needs=["QUANT"], changes=PARAMETERS,
    fix="leave the router matrix out of the quantisation",
    sources=[
        "https://github.com/vllm-project/vllm/issues/2243",
        "https://github.com/neuralmagic/AutoFP8/pull/7",
        "https://github.com/ml-explore/mlx-examples/pull/640",
        "https://github.com/casper-hansen/AutoAWQ/pull/251",
    ],
)  # fmt: skip
def quantised_router(config: Config, parameters: Parameters) -> Parameters:
    """The router matrix is quantised like the experts. The list of modules to leave out is missing."""

    def change(layer: Layer) -> Layer:
        expert: Any = layer.experts[0].w1
        if not isinstance(expert, QuantisedWeight):
            return layer
        quantised = mapped(layer.router, lambda router: quantise(router, expert.quantisation).values())
        return replace(layer, router=quantised)

    return with_layers(parameters, change)


@mutant(
    "quant-w3-scale-dropped", breaks=["EXPERT-1"], touches=["expert.up"], needs=["QUANT"], changes=PARAMETERS,
    fix="scale each half of the fused w1 and w3 by its own scales",
    sources=["https://github.com/NVIDIA/TensorRT-LLM/pull/12214"],
)  # fmt: skip
def scales_of_w1(config: Config, parameters: Parameters) -> Parameters:
    """Stacking the fused projection keeps only the scales of w1: the codes of w3 are multiplied by the scales of w1."""

    def change(expert: Any) -> Any:
        w1, w3 = expert.w1, expert.w3
        if not isinstance(w3, QuantisedWeight):
            return expert
        return replace(expert, w3=mapped(w3, lambda _: Codes(w3.stored().codes, w1.stored().scales).values()))

    return with_experts(parameters, change)


@mutant(
    "quant-qk-scale-not-permuted", breaks=["ROPE-3", "ATTN-6"], touches=["attention.q", "attention.k"],
    needs=["QUANT", "LOAD"], changes=PARAMETERS, fix="reorder the scales of wq and wk with their rows",
    sources=["https://github.com/vllm-project/vllm/pull/34243"],
)  # fmt: skip
def scales_as_stored(config: Config, parameters: Parameters) -> Parameters:
    """The codes of wq and wk are reordered for a half-split rotation, but their scales are not."""

    def change(weight: Any, heads: int) -> Any:
        if not isinstance(weight, QuantisedWeight):
            return weight

        def mixed(_: Any) -> Any:
            right = weight.stored()
            return Codes(right.codes, interleaved(right.scales, heads)).values()

        return mapped(weight, mixed)

    return with_layers(
        parameters,
        lambda layer: replace(layer, wq=change(layer.wq, config.heads), wk=change(layer.wk, config.kv_heads)),
    )


@mutant(
    "quant-smoothing-skips-router", breaks=["ROUTE-1"], touches=["router.logits"], needs=["QUANT"], changes=PARAMETERS,
    fix="name the router among the layers that the smoothing of the norm before it has to balance", severity="medium",
    sources=["https://github.com/vllm-project/llm-compressor/pull/2451"],
)  # fmt: skip
def router_not_balanced(config: Config, parameters: Parameters) -> Parameters:
    """The gain before the experts is divided by factors, and w1 and w3 are multiplied by them. The router matrix is
    not."""

    def change(layer: Layer) -> Layer:
        gain: Any = layer.moe_norm
        if not isinstance(gain, SmoothedGain):
            return layer
        return replace(layer, router=mapped(layer.router, lambda router: router / gain.factors))

    return with_layers(parameters, change)


@mutant(
    "quant-prefill-path-lower-precision", breaks=["EXPERT-1", "MODEL-4"], touches=["expert.gate", "expert.up"],
    needs=["T>1"], step="run_experts", fix="compare a prompt in one call with the same prompt token by token",
    severity="medium",
    sources=["https://github.com/ggml-org/llama.cpp/issues/4572"],
)  # fmt: skip
def rows_in_int8(ops: Any, experts: Any, x: Any, chosen: Any) -> Any:
    """Calls with several tokens use a kernel that rounds the experts' input to int8, with one scale per row. A single
    token uses a kernel that does not."""
    return right_experts(ops, experts, in_int8(x) if len(chosen) > 1 else x, chosen)


def in_int8(x: Any) -> Any:
    """Each row as codes from -127 to 127 times its own scale. x: [T, D]   returns: [T, D]"""
    mid = x.mid if isinstance(x, Enclosure) else x
    scale = np.abs(mid).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(mid, scale, out=np.zeros_like(mid), where=scale > 0)) * scale
    if not isinstance(x, Enclosure):
        return codes
    # the engine rounds the scale: a code may be off by one, and all codes move with the scale
    unsure = np.abs(np.abs(mid / scale) % 1 - 0.5) * scale < 4 * x.accumulation.u * np.abs(mid) + x.r
    radius = x.r + unsure * scale + 4 * x.accumulation.u * np.abs(codes)
    return Enclosure(codes, radius, radius**2 / 3, accumulation=x.accumulation)
