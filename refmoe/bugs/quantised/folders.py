# SPDX-License-Identifier: Apache-2.0
"""Bugs that read the quantised matrices of safetensors wrongly: FP8, int8, int4, GPTQ and AWQ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.quantised.weights import matrix_bug, misread, misread_scales, scale_bug
from refmoe.checkpoints.rows import Rows, RowWeight
from refmoe.checkpoints.scaled import AWQ_PLACES, Parts, ScaledTensor
from refmoe.checkpoints.weight import Weight

BLOCKS = ("fp8-block128x128",)
CHANNELS = ("fp8-channel", "int8-channel")
FP8 = (*BLOCKS, "fp8-channel", "fp8-tensor")
GROUPS = ("int4-group32", "int4-group128", "int8-group32", "gptq-int4-group32", "gptq-int4-group128")
GPTQ = ("gptq-int4-group32", "gptq-int4-group128", "gptq-int4-channel")
AWQ = ("awq-int4-group32", "awq-int4-group128", "awq-int4-channel")
E4M3FNUZ_LARGEST = 240
"""The largest value of the FP8 of AMD's older processors."""


def scales_at(tensor: ScaledTensor, rows: Any, groups: Any) -> Any:
    """The scales at row blocks and groups of one matrix, float64.   rows, groups: integers that broadcast to [n, in]"""
    return tensor.grid[rows, groups].astype(np.float64)


def row_blocks(tensor: ScaledTensor, rows: Rows) -> Any:
    """The row blocks that rows belong to, as a column: [n, 1]"""
    height = tensor.shape[-2]
    blocks = -(-height // tensor.block[0])
    return (rows // height * blocks + rows % height // tensor.block[0])[:, None]


# ---- FP8


@scale_bug(
    "quantised-fp8-scale-dropped", formats=FP8, fix="multiply the codes by weight_scale, or by weight_scale_inv",
    sources=["Lightricks/LTX-2/pull/172", "vllm-project/vllm/pull/47315"],
)  # fmt: skip
def scale_dropped(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The codes are taken for the weights: no scale is applied."""
    codes, zeros, scales = right
    return codes, zeros, np.ones_like(scales)


@scale_bug(
    "quantised-fp8-scales-transposed", formats=BLOCKS, fix="index the scales by row block first, and then by group",
    sources=["vllm-project/vllm/pull/34824", "unslothai/unsloth/pull/8953"],
)  # fmt: skip
def scales_transposed(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The scales of blocks are read column by column. They are stored row by row."""
    codes, zeros, scales = right
    high = -(-tensor.shape[-2] // tensor.block[0])
    block = row_blocks(tensor, rows)
    flat = tensor.grid.reshape(-1, high * tensor.grid.shape[1])
    return codes, zeros, flat[block // high, tensor.group_of * high + block % high].astype(scales.dtype)


@scale_bug(
    "quantised-fp8-scales-of-blocks-of-64", formats=BLOCKS, fix="take the size of a block from weight_block_size",
    sources=["unslothai/unsloth/pull/8953", "mit-han-lab/llm-awq/issues/21"],
)  # fmt: skip
def blocks_of_64(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """Scales are taken for those of blocks of 64 inputs. Past the last one, the last is used."""
    codes, zeros, _ = right
    group = np.minimum(np.arange(tensor.shape[-1]) // 64, tensor.grid.shape[1] - 1)
    return codes, zeros, scales_at(tensor, row_blocks(tensor, rows), group)


@scale_bug(
    "quantised-fp8-scales-to-powers-of-two", formats=BLOCKS,
    fix="quantise the weights again with the rounded scales, or keep the scales",
    sources=["huggingface/transformers/issues/47030", "huggingface/transformers/pull/46763"],
)  # fmt: skip
def scales_to_powers_of_two(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The scales of blocks are rounded up to powers of two, but the codes were made with the scales as stored."""
    codes, zeros, scales = right
    return codes, zeros, 2.0 ** np.ceil(np.log2(scales.astype(np.float64)))


@scale_bug(
    "quantised-fp8-read-as-fnuz", formats=FP8, fix="double the scales where the codes are read as e4m3fnuz",
    sources=["vllm-project/vllm/pull/7210"],
)  # fmt: skip
def read_as_fnuz(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The codes are read as e4m3fnuz, whose exponent has another bias: each value is half of the right one."""
    codes, zeros, scales = right
    return codes / 2, zeros, scales


@scale_bug(
    "quantised-fp8-saturated-at-240", formats=FP8, fix="the largest value of e4m3fn is 448, that of e4m3fnuz 240",
    sources=["ROCm/TransformerEngine/pull/485", "sgl-project/sglang/pull/40581"],
)  # fmt: skip
def saturated_at_240(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """Codes beyond 240, the largest value of e4m3fnuz, become 240."""
    codes, zeros, scales = right
    return codes.clip(-E4M3FNUZ_LARGEST, E4M3FNUZ_LARGEST), zeros, scales


@scale_bug(
    "quantised-fp8-last-scale-not-applied", formats=BLOCKS, fix="apply the scale of the last block after the loop too",
    sources=["pytorch/FBGEMM/pull/6160", "meta-pytorch/MSLK/pull/503"],
)  # fmt: skip
def last_scale_not_applied(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The scale of the last block of inputs is not applied: its codes are added up as they are."""
    codes, zeros, scales = right
    return codes, zeros, np.where(tensor.group_of == tensor.grid.shape[1] - 1, 1.0, scales)


@matrix_bug(
    "quantised-up-with-scales-of-gate", formats=(*BLOCKS, "fp8-tensor"), only=("w3",),
    fix="scale each half of a fused gate and up by its own scales",
    sources=["NVIDIA/TensorRT-LLM/pull/12214"],
)  # fmt: skip
def up_with_scales_of_gate(weight: RowWeight, weights: dict[str, Weight]) -> Weight:
    """The codes of the up projection are multiplied by the scales of the gate projection."""
    gate: Any = weights[weight.name.removesuffix("w3") + "w1"]
    own, other = weight.tensor, getattr(gate, "tensor", None)
    if not isinstance(own, ScaledTensor) or not isinstance(other, ScaledTensor) or len(own.shape) != 2:
        return weight

    def parts(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
        codes, zeros, _ = right
        return codes, zeros, scales_at(other, row_blocks(tensor, rows), tensor.group_of)

    return misread_scales(weight, own, parts)


@matrix_bug(
    "quantised-gate-and-up-exchanged", formats=FP8, only=("w1", "w3"),
    fix="the kernel of FlashInfer takes the up projection first: exchange the halves of w13 and of its scales",
    sources=["sgl-project/sglang/pull/8450", "vllm-project/vllm/pull/22357"],
)  # fmt: skip
def gate_and_up_exchanged(weight: RowWeight, weights: dict[str, Weight]) -> Weight:
    """The two halves of the fused gate and up projection are exchanged, with their scales."""
    name = weight.name[:-1] + ("3" if weight.name.endswith("1") else "1")
    other: Any = weights[name]
    if not isinstance(other, RowWeight):
        return weight
    made = misread(weight, other.tensor)
    made.view = other.view
    return made


# ---- int8 and int4


@scale_bug(
    "quantised-first-channel-for-all", formats=CHANNELS, fix="take the scale of the row, not that of row 0",
    sources=["ARM-software/ComputeLibrary/pull/1302"],
)  # fmt: skip
def first_channel_for_all(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """Every row is multiplied by the scale of the first row."""
    codes, zeros, scales = right
    return codes, zeros, np.broadcast_to(tensor.grid[:1, :1].astype(scales.dtype), scales.shape)


@scale_bug(
    "quantised-group-of-128", formats=("int4-group32", "gptq-int4-group32", "awq-int4-group32"),
    fix="take the size of a group from the configuration", sources=["mit-han-lab/llm-awq/issues/21"],
)  # fmt: skip
def group_of_128(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """Groups of 32 inputs are taken for groups of 128, so that three quarters of the scales are not used."""
    codes, zeros, _ = right
    return codes, zeros, scales_at(tensor, row_blocks(tensor, rows), np.arange(tensor.shape[-1]) // 128)


@scale_bug(
    "quantised-first-group-for-all", formats=GROUPS, fix="divide the number of the input by the size of a group",
    sources=["intel/torch-xpu-ops/pull/5001"],
)  # fmt: skip
def first_group_for_all(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """All inputs of a row are multiplied by the scale of its first group."""
    codes, zeros, _ = right
    return codes, zeros, scales_at(tensor, row_blocks(tensor, rows), np.zeros(tensor.shape[-1], np.int64))


@scale_bug(
    "quantised-groups-one-late", formats=GROUPS, fix="move on to the next group before its first input",
    sources=["1bit-MONSTER/1bit-MONSTER/issues/153"],
)  # fmt: skip
def groups_one_late(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The first input of each group takes the scale of the group before."""
    codes, zeros, _ = right
    return codes, zeros, scales_at(tensor, row_blocks(tensor, rows), np.roll(tensor.group_of, 1))


@scale_bug(
    "quantised-int4-in-order-of-awq", formats=("int4-group32", "int4-group128", "int4-channel"),
    fix="unpack the eight codes of a word in the order that the configuration names",
    sources=["amd/Quark/pull/30"],
)  # fmt: skip
def in_order_of_awq(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The eight codes of a word are taken in the order of AWQ. They are stored one after the other."""
    codes, zeros, scales = right
    return codes.reshape(len(codes), -1, 8)[..., AWQ_PLACES].reshape(codes.shape), zeros, scales


@scale_bug(
    "quantised-int4-as-twos-complement", formats=("int4-group32", "int4-group128", "int4-channel"),
    fix="subtract 8 from each packed code",
    sources=["1bit-MONSTER/1bit-MONSTER/pull/572", "intel/auto-round/pull/2273"],
)  # fmt: skip
def packed_as_twos_complement(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """Packed codes are read as signed integers of four bits. They are stored above an offset of 8."""
    codes, zeros, scales = right
    return np.where(codes < 0, codes + 8, codes - 8), zeros, scales


@scale_bug(
    "quantised-zero-points-ignored", formats=("int8-channel", "int4-group32", "int4-group128", *GPTQ, *AWQ),
    fix="subtract the zero point of the group from each code",
    sources=["vllm-project/compressed-tensors/issues/458", "vllm-project/vllm/pull/21066"],
)  # fmt: skip
def zero_points_ignored(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The zero points of an asymmetric scheme are ignored. The middle of the codes is taken for zero."""
    codes, zeros, scales = right
    middle = 8 if tensor.format.startswith(("gptq", "awq")) else 0
    return codes, None if zeros is None else np.full_like(zeros, middle), scales


# ---- GPTQ and AWQ


@scale_bug(
    "quantised-gptq-zero-of-version-1", formats=GPTQ, fix="add one to stored zero points in version 1 alone",
    sources=["vllm-project/vllm/pull/38966", "vllm-project/vllm/issues/26343"],
)  # fmt: skip
def zero_of_version_1(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """Zero points as version 2 stores them are taken for those of version 1, which are stored less one."""
    codes, zeros, scales = right
    return codes, None if zeros is None else zeros + 1, scales


@scale_bug(
    "quantised-gptq-zero-of-version-2", formats=GPTQ, fix="add one to the stored zero points of version 1",
    sources=["vllm-project/vllm/pull/26092", "AutoGPTQ/AutoGPTQ/pull/640"],
)  # fmt: skip
def zero_of_version_2(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """Zero points of version 1, which are stored less one, are taken as they are."""
    codes, zeros, scales = right
    return codes, None if zeros is None else zeros - 1, scales


@scale_bug(
    "quantised-gptq-order-ignored", formats=("gptq-int4-group32", "gptq-int4-group128"),
    fix="look up the group of each input in g_idx", sources=["intel/ipex-llm/pull/10851"],
)  # fmt: skip
def order_ignored(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The groups of inputs are taken in order, although g_idx says that the inputs are in another one."""
    in_order = replace(tensor, groups=None)
    return ScaledTensor.parts(in_order, rows, right[0].dtype)


@scale_bug(
    "quantised-awq-zero-points-in-sequence", formats=AWQ,
    fix="unpack the zero points in the order of the codes: AWQ interleaves both",
    sources=["casper-hansen/AutoAWQ/issues/275", "wejoncy/QLLM/pull/61"],
)  # fmt: skip
def zero_points_in_sequence(tensor: ScaledTensor, rows: Rows, right: Parts) -> Parts:
    """The zero points of eight outputs are taken one after the other. AWQ interleaves them."""
    codes, zeros, scales = right
    if tensor.zeros is None or zeros is None:
        return right
    order = np.argsort(AWQ_PLACES)
    moved = tensor.zeros.take(rows // 8 * 8 + order[rows % 8], tensor.grid.shape[1])[:, tensor.group_of]
    return codes, moved.astype(zeros.dtype), scales
