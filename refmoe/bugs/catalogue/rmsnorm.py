# SPDX-License-Identifier: Apache-2.0
"""Bugs of the norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.bugs.changed_weights import with_layers
from refmoe.bugs.forced_rounding import low_precision, rounded
from refmoe.bugs.mutant import CONFIG, PARAMETERS, mutant
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.steps.rounding import rms_norm as right_norm

NORMS = ("attention_norm", "moe_norm", "final_norm")
"""The taps after a norm."""

OTHER_EPS = 1e-6
"""rms_norm_eps of Llama 1, and the default of many implementations. Mixtral has 1e-5."""


def divided(ops: Any, x: Any, root: Any, gain: Any) -> Any:
    """The rows divided by their roots, times the gain. x: [T, D]   root: [T]   gain: [D]   returns: [T, D]"""
    return ops.cut("norm.normed", x / root[:, None]) * gain


# ---- eps


@mutant(
    "norm-eps-1e-6", breaks=["NORM-1"], touches=NORMS, needs=["TINYMAG"], changes=CONFIG,
    fix="take rms_norm_eps from the config",
    sources=[
        "https://github.com/ggml-org/llama.cpp/pull/2374",
        "https://github.com/ggml-org/llama.cpp/pull/2384",
        "https://github.com/apache/tvm/pull/15856",
        "https://github.com/foundation-model-stack/foundation-model-stack/pull/99",
    ],
)  # fmt: skip
def eps_of_another_model(config: Config) -> Config:
    """eps is a constant of the kernel, 1e-6, which is right for another model. The config is ignored."""
    return replace(config, norm_eps=OTHER_EPS)


@mutant(
    "norm-eps-outside-sqrt", breaks=["NORM-2"], touches=NORMS, needs=["TINYMAG"], step="rms_norm",
    fix="add eps to the mean square, inside the root", severity="medium",
    sources=[
        "https://github.com/allenai/OLMo/issues/281",
        "https://github.com/EleutherAI/gpt-neox/pull/1342",
    ],
)  # fmt: skip
def eps_after_root(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """eps is added to the root mean square, outside the root. That only avoids a division by zero."""
    x = ops.cut("norm.input", x)
    return divided(ops, x, ops.sqrt(ops.sum(x * x, axis=-1) / x.shape[-1]) + eps, gain)


# ---- precision


@mutant(
    "norm-gain-before-downcast", breaks=["NORM-3"], touches=NORMS, needs=["LOWPREC"], step="rms_norm",
    fix="round the row before its gain, if the bits of transformers are wanted", severity="low",
    sources=[
        "https://github.com/huggingface/transformers/issues/30236",
        "https://github.com/tinygrad/tinygrad/pull/5095",
        "https://github.com/vllm-project/vllm/issues/42325",
    ],
    equivalent="It rounds once where the reference rounds twice: a value may be more precise than its cut point says, "
    "so each policy allows both orders, and only a comparison with the reference's own bits tells them apart",
)  # fmt: skip
def gain_in_float32(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """The gain multiplies the row in float32 before the row is rounded to the model's dtype, not after."""
    x = ops.cut("norm.input", x)
    return x / ops.sqrt(ops.sum(x * x, axis=-1) / x.shape[-1] + eps)[:, None] * gain


@mutant(
    "norm-lowprec-variance", breaks=["NORM-1"], touches=NORMS, needs=["LOWPREC"], step="rms_norm",
    fix="convert the row to float32 before it is squared", severity="medium",
    sources=["https://github.com/jingyaogong/minimind/issues/301"],
)  # fmt: skip
def statistic_in_low_precision(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """Squares, mean and root are in bfloat16, or in the low dtype of the model. In float16, 256^2 is infinite and the
    square of 2^-13 is 0. Only the sum is taken in float32, as torch's mean does."""
    low = low_precision(ops.policy)
    coarse = rounded(x, low)
    mean_square = rounded(ops.sum(rounded(coarse * coarse, low), axis=-1) / x.shape[-1], low)
    return divided(ops, x, rounded(ops.sqrt(rounded(mean_square + eps, low)), low), gain)


# ---- what is normed, and by which gain


@mutant(
    "norm-applied-twice", breaks=["NORM-1", "NORM-3"], touches=NORMS, step="rms_norm",
    fix="norm once: its caller does it too", severity="low",
    sources=["https://github.com/ggml-org/llama.cpp/pull/1925"],
)  # fmt: skip
def normed_again(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """The norm is applied to its own result, so its gain is squared. With gains of one nobody notices."""
    once = rounded(right_norm(ops, x, gain, eps), ops.policy.storage)
    return right_norm(ops, once, gain, eps)


@mutant(
    "norm-layernorm-mean", breaks=["NORM-1"], touches=NORMS, step="rms_norm",
    fix="subtract no mean: this is RMSNorm and not LayerNorm", severity="medium",
)  # fmt: skip
def layer_norm(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """LayerNorm without a bias: the mean of the row is subtracted first, and the variance replaces the mean square."""
    x = ops.cut("norm.input", x)
    centred = x - (ops.sum(x, axis=-1) / x.shape[-1])[:, None]
    return divided(ops, centred, ops.sqrt(ops.sum(centred * centred, axis=-1) / x.shape[-1] + eps), gain)


@mutant(
    "norm-pair-swapped", breaks=["LAYER-2"], touches=["attention_norm", "moe_norm"], needs=["LOAD"],
    changes=PARAMETERS, fix="input_layernorm is before attention, post_attention_layernorm before the experts",
    severity="low",
)  # fmt: skip
def gains_exchanged(config: Config, parameters: Parameters) -> Parameters:
    """The gains of the two norms of each layer are exchanged when they are loaded."""
    return with_layers(
        parameters, lambda layer: replace(layer, attention_norm=layer.moe_norm, moe_norm=layer.attention_norm)
    )


@mutant(
    "norm-gain-plus-one", breaks=["NORM-1"], touches=NORMS, step="rms_norm",
    fix="multiply by the gain as it is stored: only some models store it less one", severity="critical",
    sources=[
        "https://github.com/Blaizzy/mlx-vlm/pull/2111",
        "https://github.com/huggingface/transformers/pull/40796",
    ],
)  # fmt: skip
def one_more_gain(ops: Any, x: Any, gain: Any, eps: float) -> Any:
    """The norm multiplies by 1 + gain, as models do whose stored gains are centred at zero."""
    more = gain + 1.0
    if isinstance(x, Enclosure):
        more = Enclosure(more, accumulation=x.accumulation)
    return right_norm(ops, x, ops.cut("weights", more), eps)  # a loader may store the sum
