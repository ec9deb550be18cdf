# SPDX-License-Identifier: Apache-2.0
"""Bugs that read the blocks of GGUF wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.quantised.bug import EXPERTS
from refmoe.bugs.quantised.weights import block_bug, place_bug
from refmoe.checkpoints.ggml_blocks import Bytes, Groups, half, six_bits
from refmoe.checkpoints.gguf_load import BlockTensor
from refmoe.checkpoints.rows import Rows

FOUR_BITS = ("Q4_0", "Q4_1")
FIVE_BITS = ("Q5_0", "Q5_1")
WITH_MINS = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
ONE_SCALE = ("Q8_0", "Q4_0", "Q5_0")
"""The formats whose blocks begin with one float16 scale."""


def halves_in_turn(codes: Any) -> Any:
    """Groups of codes [.., 2 k] whose first and second halves are taken in turn, one of each."""
    return codes.reshape(*codes.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(codes.shape)


def in_rows(tensor: BlockTensor, rows: Rows) -> Bytes:
    """The bytes of some rows: [n, blocks of a row, bytes of a block]"""
    return tensor.blocks(rows).reshape(len(rows), -1, tensor.format.nbytes).copy()


# ---- codes


@block_bug(
    "quantised-nibbles-in-pairs", formats=FOUR_BITS,
    fix="take the low halves of all bytes of a block first, and then the high halves",
    sources=["kekzl/imp/pull/722", "paiml/aprender/pull/2069"],
)  # fmt: skip
def nibbles_in_pairs(raw: Bytes, right: Groups) -> Groups:
    """Byte i of a block is taken for values 2 i and 2 i + 1. It holds the values i and i + 16."""
    return replace(right, codes=halves_in_turn(right.codes))


@block_bug(
    "quantised-nibbles-exchanged", formats=FOUR_BITS, fix="the low half of a byte belongs to the first half of a block",
    sources=["1bit-MONSTER/1bit-MONSTER/pull/572"],
)  # fmt: skip
def nibbles_exchanged(raw: Bytes, right: Groups) -> Groups:
    """The high half of a byte is taken for the earlier value, and the low half for the later one."""
    return replace(right, codes=np.roll(right.codes, right.codes.shape[-1] // 2, axis=-1))


@block_bug(
    "quantised-zero-point-off-by-one", formats=("Q4_0",), fix="the zero of Q4_0 is the code 8",
    sources=["kekzl/imp/pull/722"],
)  # fmt: skip
def zero_point_of_7(raw: Bytes, right: Groups) -> Groups:
    """The code of zero is taken for 7, in the middle between 0 and 15. It is 8."""
    return replace(right, codes=right.codes + 1)


@block_bug(
    "quantised-codes-as-twos-complement", formats=("Q4_0",), fix="subtract 8 from each code of Q4_0",
    sources=["1bit-MONSTER/1bit-MONSTER/pull/572"],
)  # fmt: skip
def twos_complement(raw: Bytes, right: Groups) -> Groups:
    """Codes of four bits are read as signed integers. They are integers from 0, whose zero is 8."""
    return replace(right, codes=np.where(right.codes < 0, right.codes + 8, right.codes - 8))


@block_bug(
    "quantised-codes-unsigned", formats=("Q8_0",), fix="name the type int8_t: a plain char is unsigned on ARM",
    sources=["tinygrad/tinygrad/pull/7796", "pytorch/pytorch/pull/52616"],
)  # fmt: skip
def codes_unsigned(raw: Bytes, right: Groups) -> Groups:
    """Signed codes of eight bits are read as unsigned ones: -1 becomes 255."""
    return replace(right, codes=right.codes.astype(np.int16) & 255)


@block_bug(
    "quantised-fifth-bits-of-first-half", formats=FIVE_BITS,
    fix="the fifth bit of value i + 16 is bit i + 16 of the 32 high bits",
    sources=["paiml/aprender/pull/1656", "paiml/aprender/pull/1621"],
)  # fmt: skip
def fifth_bits_of_first_half(raw: Bytes, right: Groups) -> Groups:
    """The second half of a block takes the fifth bits of the first half."""
    codes = right.codes.astype(np.int16) + (16 if right.offsets is None else 0)
    high = codes[..., :16] & 16
    whole = codes & 15 | np.concatenate([high, high], axis=-1)
    return replace(right, codes=whole - (16 if right.offsets is None else 0))


@block_bug(
    "quantised-k-codes-in-sequence", formats=("Q4_K",), fix="the two halves of a byte are 32 values apart",
    sources=["paiml/aprender/pull/2127", "cisco-ai-defense/defenseclaw/pull/679"],
)  # fmt: skip
def k_codes_in_sequence(raw: Bytes, right: Groups) -> Groups:
    """Byte i of a block of 256 is taken for values 2 i and 2 i + 1. Its halves belong to two groups of 32."""
    pairs = right.codes.reshape(-1, 4, 64)
    return replace(right, codes=halves_in_turn(pairs).reshape(right.codes.shape))


@block_bug(
    "quantised-k-fifth-bits-in-sequence", formats=("Q5_K",), fix="bit g of byte i belongs to value i of group g",
    sources=["paiml/aprender/pull/2127"],
)  # fmt: skip
def k_fifth_bits_in_sequence(raw: Bytes, right: Groups) -> Groups:
    """The fifth bits of a block of 256 are read one value after the other. They are stored group by group."""
    high = np.unpackbits(raw[:, 16:48], axis=-1, bitorder="little").reshape(right.codes.shape)
    return replace(right, codes=right.codes & 15 | high << np.uint8(4))


@block_bug(
    "quantised-k-offset-dropped", formats=("Q6_K",), fix="subtract 32 from each code of Q6_K",
    sources=["kekzl/imp/pull/722"],
)  # fmt: skip
def k_offset_dropped(raw: Bytes, right: Groups) -> Groups:
    """The codes of Q6_K are taken as they are stored, from 0 to 63. Their zero is 32."""
    return replace(right, codes=right.codes + np.int8(32))


@block_bug(
    "quantised-k-rest-of-half-is-zero", formats=("Q6_K",), fix="write all four runs of 32 of each half of a block",
    sources=["1bit-MONSTER/1bit-MONSTER/issues/734"],
)  # fmt: skip
def k_rest_is_zero(raw: Bytes, right: Groups) -> Groups:
    """Only the first 32 of each 128 values are written. The others stay zero."""
    codes = right.codes.reshape(-1, 2, 128).copy()
    codes[..., 32:] = 0
    return replace(right, codes=codes.reshape(right.codes.shape))


# ---- scales and mins


@block_bug(
    "quantised-mins-dropped", formats=WITH_MINS, fix="add the offset of each group to its scaled codes",
    sources=["kekzl/imp/pull/722", "antirez/gguf-tools/pull/9"],
)  # fmt: skip
def mins_dropped(raw: Bytes, right: Groups) -> Groups:
    """The offset of each group is left out."""
    return replace(right, offsets=np.zeros_like(right.offsets))


@block_bug(
    "quantised-mins-added-twice", formats=WITH_MINS,
    fix="add the offset either to the weights or to the sum, not to both",
    sources=["kekzl/imp/pull/722"],
)  # fmt: skip
def mins_added_twice(raw: Bytes, right: Groups) -> Groups:
    """The offset of each group is added to the weights, and once more to the sum."""
    return replace(right, offsets=None if right.offsets is None else 2 * right.offsets)


@block_bug(
    "quantised-mins-with-other-sign", formats=WITH_MINS,
    fix="add the mins of Q4_1 and Q5_1, and subtract those of Q4_K and Q5_K",
    sources=["1bit-MONSTER/1bit-MONSTER/pull/2629"],
)  # fmt: skip
def mins_with_other_sign(raw: Bytes, right: Groups) -> Groups:
    """The offset of each group is subtracted where it is to be added, or added where it is to be subtracted."""
    return replace(right, offsets=None if right.offsets is None else -right.offsets)


@block_bug(
    "quantised-k-scales-of-four-bits", formats=("Q4_K", "Q5_K"),
    fix="the two high bits of scales 4 to 7 lie above scales 0 to 3",
    sources=["paiml/aprender/pull/2115"],
)  # fmt: skip
def scales_of_four_bits(raw: Bytes, right: Groups) -> Groups:
    """Only four of the six bits of the scales and mins of groups 4 to 7 are read."""
    scales, mins = six_bits(raw[:, 4:16])
    return with_six_bits(raw, right, scales & low_bits(), mins & low_bits())


@block_bug(
    "quantised-k-scales-in-sequence", formats=("Q4_K", "Q5_K"),
    fix="unpack the twelve bytes of scales as get_scale_min_k4 of ggml does",
    sources=["paiml/trueno/issues/182", "paiml/aprender/pull/2141"],
)  # fmt: skip
def scales_in_sequence(raw: Bytes, right: Groups) -> Groups:
    """The scale and min of each group are taken for twelve bits in sequence. Those of groups 4 to 7 are split."""
    bits = np.unpackbits(raw[:, 4:16], axis=-1, bitorder="little").reshape(-1, 8, 2, 6)
    whole = (bits << np.arange(6, dtype=np.uint8)).sum(-1).astype(np.uint8)
    return with_six_bits(raw, right, whole[..., 0], whole[..., 1])


@block_bug(
    "quantised-k-scales-and-mins-exchanged", formats=("Q4_K", "Q5_K"),
    fix="of bytes 8 to 11 the low halves belong to scales, and the high halves to mins",
    sources=["paiml/aprender/pull/2141"],
)  # fmt: skip
def scales_and_mins_exchanged(raw: Bytes, right: Groups) -> Groups:
    """The low four bits of the scales and of the mins of groups 4 to 7 change places."""
    exchanged = raw.copy()
    exchanged[:, 12:16] = raw[:, 12:16] << 4 | raw[:, 12:16] >> 4
    return with_six_bits(raw, right, *six_bits(exchanged[:, 4:16]))


@block_bug(
    "quantised-k-scales-ignored", formats=("Q4_K", "Q5_K"), fix="multiply by the six-bit scale and min of each group",
    sources=["cisco-ai-defense/defenseclaw/pull/679"],
)  # fmt: skip
def scales_ignored(raw: Bytes, right: Groups) -> Groups:
    """The scales of groups are ignored: the scale and min of the block serve all of them."""
    ones = np.ones((len(raw), 8), np.uint8)
    return with_six_bits(raw, right, ones, ones)


def low_bits() -> Any:
    """All bits of the first four groups, and the low four bits of the others: [8]"""
    return np.repeat(np.array([63, 15], np.uint8), 4)


def with_six_bits(raw: Bytes, right: Groups, scales: Bytes, mins: Bytes) -> Groups:
    """Blocks of Q4_K or Q5_K with other scales and mins of groups: [n, 8] each"""
    return replace(right, scales=half(raw[:, :2]) * scales, offsets=-(half(raw[:, 2:4]) * mins))


@block_bug(
    "quantised-k-scales-unsigned", formats=("Q6_K",), fix="read the scales of groups as signed bytes",
    sources=["vllm-project/vllm/issues/48905", "vllm-project/vllm/pull/48926"],
)  # fmt: skip
def scales_unsigned(raw: Bytes, right: Groups) -> Groups:
    """The scales of groups are signed bytes, but are read as unsigned ones."""
    return replace(right, scales=half(raw[:, 208:210]) * raw[:, 192:208])


@block_bug(
    "quantised-k-scale-of-32", formats=("Q6_K",), fix="each 16 values of Q6_K have a scale of their own",
    sources=["paiml/aprender/pull/1924"],
)  # fmt: skip
def scale_of_32(raw: Bytes, right: Groups) -> Groups:
    """Two groups of 16 values share the scale of the first, as if a group had 32."""
    return replace(right, scales=np.repeat(right.scales[:, ::2], 2, axis=1))


@block_bug(
    "quantised-mx-nibbles-in-pairs", formats=("MXFP4",),
    fix="take the low halves of all bytes of a block first, and then the high halves",
    sources=["kekzl/imp/pull/567"],
)  # fmt: skip
def mx_nibbles_in_pairs(raw: Bytes, right: Groups) -> Groups:
    """Byte i of a block is taken for values 2 i and 2 i + 1, as other files of MXFP4 have them."""
    return replace(right, codes=halves_in_turn(right.codes))


@block_bug(
    "quantised-mx-doubled-table-not-halved", formats=("MXFP4",),
    fix="a table of doubled values goes with half the scale", sources=["tinygrad/tinygrad/pull/14850"],
)  # fmt: skip
def doubled_not_halved(raw: Bytes, right: Groups) -> Groups:
    """The values of the table are doubled, to be integers, but the scale is not halved."""
    return replace(right, scales=2 * right.scales)


@block_bug(
    "quantised-mx-halved-twice", formats=("MXFP4",), fix="halve the scale only where the table is doubled",
    sources=["tinygrad/tinygrad/pull/14850"],
)  # fmt: skip
def halved_twice(raw: Bytes, right: Groups) -> Groups:
    """The scale is halved, as for a table of doubled values, but the table has the values themselves."""
    return replace(right, scales=right.scales / np.float32(2))


@block_bug(
    "quantised-mx-exponent-bias-125", formats=("MXFP4",), fix="the bias of an exponent of E8M0 is 127",
    sources=["vllm-project/compressed-tensors/pull/538"],
)  # fmt: skip
def exponent_bias_125(raw: Bytes, right: Groups) -> Groups:
    """The exponent of a block is read with the bias 125, so that the scale is four times too large."""
    return replace(right, scales=4 * right.scales)


@block_bug(
    "quantised-mx-subnormals-as-normals", formats=("MXFP4",),
    fix="with the exponent 0 the values are 0 and 1/2, without a leading one",
    sources=["tile-ai/tilelang/issues/2704"],
)  # fmt: skip
def subnormals_as_normals(raw: Bytes, right: Groups) -> Groups:
    """Codes with the exponent 0 get a leading one: 0 becomes 1/2, and 1/2 becomes 3/4."""
    packed = raw[:, None, 1:]
    nibbles = np.concatenate([packed & 15, packed >> 4], axis=-1)
    small = np.where(nibbles & 7 == 0, 2, 3) * np.where(nibbles & 8, -1, 1)
    return replace(right, codes=np.where(nibbles & 6, 2 * right.codes, small), scales=right.scales / np.float32(2))


# ---- places


@place_bug(
    "quantised-scale-of-the-next-block", formats=ONE_SCALE, fix="advance the scale with its block, not before it",
    sources=["1bit-MONSTER/1bit-MONSTER/issues/153", "sgl-project/sglang/pull/36237"],
)  # fmt: skip
def scale_of_the_next_block(tensor: BlockTensor, rows: Rows) -> Bytes:
    """Each block is multiplied by the scale of the next block of its row."""
    blocks = in_rows(tensor, rows)
    blocks[..., :2] = np.roll(blocks[..., :2], -1, axis=1)
    return blocks.reshape(-1, tensor.format.nbytes)


@place_bug(
    "quantised-first-scale-for-a-row", formats=ONE_SCALE, fix="divide the number of the value, not that of the tile",
    sources=["intel/torch-xpu-ops/pull/5001"],
)  # fmt: skip
def first_scale_for_a_row(tensor: BlockTensor, rows: Rows) -> Bytes:
    """All blocks of a row are multiplied by the scale of its first block."""
    blocks = in_rows(tensor, rows)
    blocks[..., :2] = blocks[:, :1, :2]
    return blocks.reshape(-1, tensor.format.nbytes)


@place_bug(
    "quantised-rows-one-block-short", formats=("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"),
    fix="a row begins where the whole blocks of the row before it end",
    sources=["ROCm/hip-ep/pull/588", "ggml-org/llama.cpp/pull/21397"],
)  # fmt: skip
def rows_one_block_short(tensor: BlockTensor, rows: Rows) -> Bytes:
    """The distance of two rows is one block too short, so that each row begins a block earlier than the one before."""
    height, per_row = tensor.shape[-2], tensor.shape[-1] // tensor.format.size
    places = (rows % height * (per_row - 1))[:, None] + np.arange(per_row)
    needed, where = np.unique((rows // height * height)[:, None] + places // per_row, return_inverse=True)
    found: Bytes = in_rows(tensor, needed)[where.reshape(places.shape), places % per_row]
    return found.reshape(-1, tensor.format.nbytes)


@place_bug(
    "quantised-scales-of-expert-0", formats=ONE_SCALE, only=EXPERTS,
    fix="add the expert's number times the scales of an expert to the place of a scale",
    sources=["aws-neuron/neuronx-distributed-inference/pull/35", "PTO-ISA/SuperNPUBench/pull/74"],
)  # fmt: skip
def scales_of_expert_0(tensor: BlockTensor, rows: Rows) -> Bytes:
    """The codes of every expert are multiplied by the scales of the first expert."""
    blocks = in_rows(tensor, rows)
    blocks[..., :2] = in_rows(tensor, rows % tensor.shape[-2])[..., :2]
    return blocks.reshape(-1, tensor.format.nbytes)
