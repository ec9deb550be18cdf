# SPDX-License-Identifier: Apache-2.0
"""Bugs of the residual stream, the final norm and the output matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refmoe.bugs.mutant import PARAMETERS, mutant
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters, attention_half, moe_half, norm
from refmoe.steps.rounding import rms_norm as right_norm


@mutant(
    "resid-from-normed", breaks=["LAYER-1"], touches=["attention_residual"], step="decoder_layer",
    fix="add the block's output to the hidden state before its norm",
    sources=[
        "https://github.com/allenai/OLMo/pull/680",
        "https://github.com/Howuhh/faster-trajectory-transformer/issues/3",
    ],
)  # fmt: skip
def normed_residual(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """The output of attention is added to the normed hidden state: the residual is taken after the norm."""
    normed = norm(ops, model, "attention_norm", x, layer.attention_norm)
    attended, cache = model.steps.attention(ops, model, layer, normed, positions, cache)
    return moe_half(ops, model, layer, ops.tap("attention_residual", normed + attended)), cache


@mutant(
    "head-final-norm-missing", breaks=["MODEL-3"], touches=["final_norm"], step="rms_norm",
    fix="norm the last hidden state before the output matrix",
    sources=[
        "https://github.com/NVIDIA/Model-Optimizer/pull/1846",
        "https://github.com/vllm-project/speculators/pull/313",
        "https://github.com/PaddlePaddle/PaddleNLP/pull/7615",
    ],
)  # fmt: skip
def no_final_norm(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """The output matrix reads the last hidden state without the final norm. A stage of a pipeline may forget it."""
    in_a_layer = bool(ops._prefix)
    return right_norm(ops, x, gain, eps) if in_a_layer else x


@mutant(
    "head-tied-wrongly", breaks=["MODEL-3"], touches=["logits"], needs=["LOAD"], changes=PARAMETERS,
    fix="load lm_head.weight; tie it to the embedding only where tie_word_embeddings says so", severity="critical",
    sources=[
        "https://github.com/huggingface/transformers/issues/42313",
        "https://github.com/NVIDIA/TensorRT-LLM/issues/3324",
    ],
)  # fmt: skip
def tied(config: Config, parameters: Parameters) -> Parameters:
    """The output matrix is the embedding. Tying is the default of a base class, and the matrix in the checkpoint is
    dropped."""
    return replace(parameters, output=parameters.embedding)


@mutant(
    "hidden-tap-off-by-one", breaks=["LAYER-1"], touches=["residual"], step="decoder_layer",
    fix="look at the capture, not at the model: the hidden state of a layer is its output", severity="low",
    sources=[
        "https://github.com/lightseekorg/TorchSpec/issues/87",
        "https://github.com/vllm-project/speculators/pull/313",
    ],
)  # fmt: skip
def tap_of_layer_before(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """The hidden state shown for a layer is that of the layer before. The computation itself is right."""
    h, cache = attention_half(ops, model, layer, x, positions, cache)
    normed = norm(ops, model, "moe_norm", h, layer.moe_norm)
    ops.tap("residual", x)
    return ops.cut("residual", h + model.steps.moe(ops, model, layer, normed)), cache


@mutant(
    "resid-from-moe-norm", breaks=["LAYER-1"], touches=["residual"], step="decoder_layer",
    fix="add the experts' output to the hidden state before its norm",
    sources=[
        "https://github.com/shivanandmn/Knowledge-Tracing-SAINT/issues/6",
        "https://github.com/lbcb-sci/RiNALMo/issues/9",
    ],
)  # fmt: skip
def normed_residual_of_experts(ops: Any, model: Any, layer: Any, x: Any, positions: Any, cache: Any) -> Any:
    """The output of the experts is added to the hidden state after its norm. The attention half has the right
    residual."""
    h, cache = attention_half(ops, model, layer, x, positions, cache)
    normed = norm(ops, model, "moe_norm", h, layer.moe_norm)
    return ops.tap("residual", normed + model.steps.moe(ops, model, layer, normed)), cache
