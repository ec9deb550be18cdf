"""Bugs of quantised engines. What is held against the specification are the dequantised weights: `quantised.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.bugs.catalogue.loading import interleaved
from refmoe.bugs.mutant import PARAMETERS, mutant
from refmoe.bugs.quantised import Codes, QuantisedWeight, SmoothedGain, quantise
from refmoe.bugs.weights import mapped, with_experts, with_layers
from refmoe.spec.config import Config
from refmoe.spec.model import Layer, Parameters
from refmoe.steps.rounding import run_experts as right_experts


@mutant(
    "quant-router-quantised", breaks=["ROUTE-1"], touches=["router.logits"], needs=["QUANT"], changes=PARAMETERS,
    fix="leave the router's gate out of what is quantised", severity="high",
    sources=[
        "https://github.com/vllm-project/vllm/issues/2243",
        "https://github.com/neuralmagic/AutoFP8/pull/7",
        "https://github.com/ml-explore/mlx-examples/pull/640",
        "https://github.com/casper-hansen/AutoAWQ/pull/251",
    ],
)  # fmt: skip
def quantised_gate(config: Config, parameters: Parameters) -> Parameters:
    """The router's gate is quantised as the experts are: the list of modules to leave as they are was not there."""

    def change(layer: Layer) -> Layer:
        expert: Any = layer.experts[0].w1
        if not isinstance(expert, QuantisedWeight):
            return layer
        quantised = mapped(layer.router, lambda router: quantise(router, expert.quantisation).values())
        return replace(layer, router=quantised)

    return with_layers(parameters, change)


@mutant(
    "quant-w3-scale-dropped", breaks=["EXPERT-1"], touches=["expert.up"], needs=["QUANT"], changes=PARAMETERS,
    fix="scale each half of the fused w1 and w3 by its own scales", severity="high",
    sources=["https://github.com/NVIDIA/TensorRT-LLM/pull/12214"],
)  # fmt: skip
def scales_of_w1(config: Config, parameters: Parameters) -> Parameters:
    """Of the two scales of the fused projection the stacking keeps w1's: w3's codes are multiplied by those."""

    def change(expert: Any) -> Any:
        w1, w3 = expert.w1, expert.w3
        if not isinstance(w3, QuantisedWeight):
            return expert
        return replace(expert, w3=mapped(w3, lambda _: Codes(w3.stored().codes, w1.stored().scales).values()))

    return with_experts(parameters, change)


@mutant(
    "quant-qk-scale-not-permuted", breaks=["ROPE-3", "ATTN-6"], touches=["attention.q", "attention.k"],
    needs=["QUANT", "LOAD"], changes=PARAMETERS, fix="reorder the scales of wq and wk with their rows", severity="high",
    sources=["https://github.com/vllm-project/vllm/pull/34243"],
)  # fmt: skip
def scales_as_stored(config: Config, parameters: Parameters) -> Parameters:
    """The codes of wq and wk have their rows reordered for a half-split rotation, their scales have not."""

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
def gate_not_balanced(config: Config, parameters: Parameters) -> Parameters:
    """The gain before the experts is divided by factors that w1 and w3 are multiplied by; the router's gate is not."""

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
    """Calls with several tokens take a kernel that rounds what the experts read to int8, with one scale a row; a single
    token takes one that does not."""
    return right_experts(ops, experts, in_int8(x) if len(chosen) > 1 else x, chosen)


def in_int8(x: Any) -> Any:
    """Each row as codes from -127 to 127 times its own scale. x: [T, D]   returns: [T, D]"""
    mid = x.mid if isinstance(x, Enclosure) else x
    scale = np.abs(mid).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(mid, scale, out=np.zeros_like(mid), where=scale > 0)) * scale
    if not isinstance(x, Enclosure):
        return codes
    # the scale itself is rounded by the engine: a code may be one further, and all of them move with it
    unsure = np.abs(np.abs(mid / scale) % 1 - 0.5) * scale < 4 * x.accumulation.u * np.abs(mid) + x.r
    radius = x.r + unsure * scale + 4 * x.accumulation.u * np.abs(codes)
    return Enclosure(codes, radius, radius**2 / 3, x.accumulation)
