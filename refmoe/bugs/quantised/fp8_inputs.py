# SPDX-License-Identifier: Apache-2.0
"""Bugs that make wrong FP8 codes of the input of a product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.arithmetic.codes import E4M3, KINDS, Codes
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, FLOAT32, nearest
from refmoe.bugs.mutant import POLICY
from refmoe.bugs.quantised.bug import register
from refmoe.bugs.quantised.folders import E4M3FNUZ_LARGEST, FP8
from refmoe.bugs.quantised.inputs import (
    input_bug,
    not_quantised,
    of_the_token_before,
    powers_of_two,
    spread,
    without,
)

BLOCKS = ("fp8-block128x128",)
MOST = KINDS["e4m3"].high
"""The largest code, 448."""


def coded(over: Any) -> Any:
    """Real numbers as FP8 codes, saturated."""
    return nearest(np.clip(over, -MOST, MOST), E4M3)


def with_scales(right: Codes, x: Any, scales: Any) -> Codes:
    """Codes made with other scales.   scales: float32 numbers [t, blocks]"""
    whole = spread(scales, right)
    over = np.divide(x, whole, out=np.zeros(x.shape), where=whole != 0)
    return replace(right, codes=coded(over), scales=scales, unrounded=scales, ideal=over)


# ---- scales


@input_bug(
    "quantised-fp8-input-one-scale-for-all-tokens", kind="e4m3", formats=FP8,
    fix="take the largest value of each token by itself, not that of the tensor",
    sources=["vllm-project/vllm/pull/20937", "unslothai/unsloth/pull/6772"],
)  # fmt: skip
def one_scale_for_all_tokens(right: Codes, x: Any) -> Codes:
    """All tokens of a call share the scale of the tensor's largest value. The scheme has a scale for each token."""
    return with_scales(right, x, np.full_like(right.scales, right.scales.max()))


@input_bug(
    "quantised-fp8-input-scale-of-the-token-before", kind="e4m3", formats=FP8,
    fix="address the scales by the strides that their own layout has",
    sources=["sgl-project/sglang/pull/29275", "sgl-project/sglang/pull/36237"],
)  # fmt: skip
def scale_of_the_token_before(right: Codes, x: Any) -> Codes:
    """The codes of each token are multiplied by the scales of the token before it."""
    return of_the_token_before(right)


@input_bug(
    "quantised-fp8-input-scale-to-power-of-two", kind="e4m3", formats=FP8,
    fix="round the scale up before the codes are made with it",
    sources=["sgl-project/sglang/pull/28418", "huggingface/transformers/issues/47030"],
)  # fmt: skip
def scale_to_power_of_two(right: Codes, x: Any) -> Codes:
    """The scale is rounded up to a power of two after the codes were made with the scale as it was."""
    return replace(right, scales=powers_of_two(right.scales, np.ceil))


@input_bug(
    "quantised-fp8-input-scale-loses-its-fraction", kind="e4m3", formats=FP8,
    fix="make the codes with a power of two, or hand the kernel scales that it takes",
    sources=["sgl-project/sglang/issues/39193", "sgl-project/sglang/pull/39289"],
)  # fmt: skip
def scale_loses_its_fraction(right: Codes, x: Any) -> Codes:
    """The kernel takes the exponent of the scale alone, but the codes were made with the whole scale."""
    return replace(right, scales=powers_of_two(right.scales, np.floor))


@input_bug(
    "quantised-fp8-input-scale-rounded-down", kind="e4m3", formats=FP8,
    fix="round the exponent of the scale up, so that the largest value stays within 448",
    sources=["vllm-project/vllm/pull/43557"],
)  # fmt: skip
def scale_rounded_down(right: Codes, x: Any) -> Codes:
    """The scale is rounded down to a power of two before codes are made, so that the largest values are clamped."""
    return with_scales(right, x, powers_of_two(right.scales, np.floor))


@input_bug(
    "quantised-fp8-input-groups-one-late", kind="e4m3", formats=BLOCKS,
    fix="divide the number of the value by 128: value 128 belongs to the second scale",
    sources=["1bit-MONSTER/1bit-MONSTER/issues/153", "vllm-project/vllm/pull/46593"],
)  # fmt: skip
def groups_one_late(right: Codes, x: Any) -> Codes:
    """The first value of each block of 128 is multiplied by the scale of the block before."""
    whole = spread(right.scales, right)
    late = np.concatenate([whole[:, :1], whole[:, :-1]], axis=1)
    return replace(right, scales=late, unrounded=late)


@input_bug(
    "quantised-fp8-input-first-scale-for-a-token", kind="e4m3", formats=BLOCKS,
    fix="each 128 values of a token have a scale of their own",
    sources=["inclusionAI/humming/pull/35", "intel/torch-xpu-ops/pull/5001"],
)  # fmt: skip
def first_scale_for_a_token(right: Codes, x: Any) -> Codes:
    """All codes of a token are multiplied by the scale of its first block."""
    first = np.broadcast_to(right.scales[:, :1], right.scales.shape)
    return replace(right, scales=first, unrounded=first)


@input_bug(
    "quantised-fp8-input-scale-in-bfloat16", kind="e4m3", formats=FP8,
    fix="compute the scale in float32, also where the model is in bfloat16",
    sources=["pytorch/ao/pull/4326"],
)  # fmt: skip
def scale_in_bfloat16(right: Codes, x: Any) -> Codes:
    """The scale is rounded to bfloat16, and the codes are made with it."""
    return with_scales(right, x, nearest(right.scales, BFLOAT16))


# ---- codes


@input_bug(
    "quantised-fp8-input-truncated", kind="e4m3", formats=FP8, fix="round to the nearest code, ties to even",
    sources=["1bit-MONSTER/1bit-MONSTER/issues/304", "vllm-project/vllm/pull/39445"],
)  # fmt: skip
def truncated(right: Codes, x: Any) -> Codes:
    """The value over its scale is cut off to the next code toward zero, and not rounded."""
    over = np.clip(right.ideal * (1 + 2.0**-22), -MOST, MOST)  # the largest value of a block is 448, not less
    spacing = right.how.limits.spacing(over)
    codes = np.trunc(over / spacing) * spacing
    return replace(right, codes=codes, ideal=codes)


@input_bug(
    "quantised-fp8-input-rounded-twice", kind="e4m3", formats=FP8,
    fix="convert from float32 to FP8 in one step",
    sources=["triton-lang/triton/pull/2583", "FlashML-org/FreeToken/pull/85", "triton-lang/triton/pull/11753"],
)  # fmt: skip
def rounded_twice(right: Codes, x: Any) -> Codes:
    """The value over its scale is rounded to bfloat16 first, and then to FP8."""
    return replace(right, codes=coded(nearest(right.ideal, BFLOAT16)), ideal=nearest(right.ideal, BFLOAT16))


@input_bug(
    "quantised-fp8-input-cut-to-float16", kind="e4m3", formats=FP8,
    fix="convert from float32 to FP8 in one step",
    sources=["FlashML-org/FreeToken/pull/85", "triton-lang/triton/pull/11753"],
)  # fmt: skip
def cut_to_float16(right: Codes, x: Any) -> Codes:
    """The value over its scale is cut off to float16 first, and then rounded to FP8: always toward zero."""
    near = nearest(right.ideal, FLOAT16)
    cut = np.where(np.abs(near) > np.abs(right.ideal), np.nextafter(near.astype(np.float16), np.float16(0)), near)
    return replace(right, codes=coded(cut), ideal=cut.astype(np.float64))


@input_bug(
    "quantised-fp8-input-saturated-at-240", kind="e4m3", formats=FP8,
    fix="take the largest value from the dtype: 448 for e4m3fn, 240 for e4m3fnuz",
    sources=["ROCm/TransformerEngine/pull/485", "ROCm/DeepEP/pull/17"],
)  # fmt: skip
def saturated_at_240(right: Codes, x: Any) -> Codes:
    """The scale is made for 448, but codes beyond 240, the largest value of e4m3fnuz, become 240."""
    low = np.clip(right.ideal, -E4M3FNUZ_LARGEST, E4M3FNUZ_LARGEST)
    return replace(right, codes=right.codes.clip(-E4M3FNUZ_LARGEST, E4M3FNUZ_LARGEST), ideal=low)


@input_bug(
    "quantised-fp8-input-scaled-to-240", kind="e4m3", formats=FP8,
    fix="take the largest value from the dtype: 448 for e4m3fn, 240 for e4m3fnuz",
    sources=["ROCm/TransformerEngine/pull/485", "modelscope/DiffSynth-Studio/pull/1528"],
)  # fmt: skip
def scaled_to_240(right: Codes, x: Any) -> Codes:
    """The scale makes 240 of the largest value, as for e4m3fnuz. The codes are those of e4m3fn."""
    return with_scales(right, x, nearest(right.scales * (MOST / E4M3FNUZ_LARGEST), FLOAT32))


@input_bug(
    "quantised-fp8-input-scaled-to-480", kind="e4m3", formats=FP8,
    fix="the largest value of e4m3fn is 448: the bits of 480 are a NaN",
    sources=["OpenPPL/ppq/issues/398"],
)  # fmt: skip
def scaled_to_480(right: Codes, x: Any) -> Codes:
    """The scale makes 480 of the largest value, and what lies beyond 448 is clamped."""
    return with_scales(right, x, nearest(right.scales * (MOST / E4M3.largest), FLOAT32))


@input_bug(
    "quantised-fp8-input-last-block-dropped", kind="e4m3", formats=FP8, fix="round the number of blocks up",
    sources=["1bit-MONSTER/1bit-MONSTER/issues/301", "pytorch/FBGEMM/pull/6160"],
)  # fmt: skip
def last_block_dropped(right: Codes, x: Any) -> Codes:
    """The last 128 inputs of a row are not multiplied."""
    return without(right, np.arange(x.shape[1]) >= x.shape[1] - 128)


register(
    "quantised-fp8-input-not-quantised", POLICY, not_quantised, not_quantised.__doc__ or "", formats=FP8,
    fix="make FP8 codes of the inputs, as the checkpoint asks for", sources=["vllm-project/vllm/pull/50833"],
)  # fmt: skip
