# SPDX-License-Identifier: Apache-2.0
"""Bugs of fused mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.bugs.kernels.bug import bug, remembering_bug
from refmoe.bugs.kernels.honest import expert, mapped, mixture, swiglu, wide

TILE = 32


@bug(
    "expert-offset-of-32-bits",
    "The place of an expert's matrix is its number times a stride, in int32, which wraps beyond 2^31 elements.",
    "linkedin/Liger-Kernel/issues/1296",
    "2026-07-10",
)
def expert_offset_of_32_bits(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    def wrapped(matrices: Array) -> list[Array]:
        stride = matrices.strides[0] // matrices.itemsize
        reached = [number for number in range(len(matrices)) if number * stride < 1 << 31]
        # a wrapped offset is negative: a read before the array, which on a GPU is another tensor's memory
        return [matrices[n] if n in reached else np.zeros_like(matrices[0]) for n in range(len(matrices))]

    return mixture(x, wrapped(w_gate), wrapped(w_up), wrapped(w_down), ids, weights)


@bug(
    "last-tile-never-stored",
    "The combination schedules tokens // 32 tiles, so that the last 1 to 31 rows of the output are not written.",
    "linkedin/Liger-Kernel/pull/1361",
    "2026-08-10",
    buffer=True,
)
def last_tile_never_stored(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array, out: Array
) -> None:
    whole = len(x) // TILE * TILE
    out[:whole] = mixture(x, w_gate, w_up, w_down, ids, weights)[:whole]


@bug(
    "zeros-for-small-batches",
    "For 32 tokens and fewer a kernel with blocks of 32 is chosen, which returns zeros.",
    "ROCm/aiter/pull/4451",
    "2026-07-30",
    dtype="bfloat16",
)
def zeros_for_small_batches(x: Array, *others: Array) -> Array:
    return np.zeros_like(x) if len(x) <= TILE else mixture(x, *others)


@bug(
    "token-indices-off-by-a-few",
    "Where the number of tokens is no multiple of 32, some entries of the lists of experts after the first are too "
    "large by one.",
    "tenstorrent/tt-metal/issues/50669",
    "2026-07-22",
)
def token_indices_off(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    total = np.zeros(x.shape, np.float32)
    for number in np.unique(ids):
        tokens, slots = np.nonzero(ids == number)
        read = tokens.copy()
        if number > 0 and len(x) % TILE:
            read[-1] = min(read[-1] + 1, len(x) - 1)
        out = expert(x[read], w_gate[number], w_up[number], w_down[number])
        np.add.at(total, tokens, weights[tokens, slots][:, None] * out)
    return total


@bug(
    "unwritten-slots-summed",
    "The intermediate of a slot with id -1 is not written, and the sum over slots adds what its memory held.",
    "vllm-project/vllm/pull/46408",
    "2026-06-22",
    padding=True,
)
def unwritten_slots_summed(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    slots = np.full((*ids.shape, x.shape[1]), 1.25, np.float32)  # what an earlier kernel left there
    for number in np.unique(ids[ids >= 0]):
        here = ids == number
        slots[here] = expert(x[np.nonzero(here)[0]], w_gate[number], w_up[number], w_down[number])
    return (weights[..., None] * slots).sum(axis=1)


@bug(
    "map-indexed-with-minus-one",
    "The map of experts is indexed with -1, which names its last entry, a valid expert.",
    "vllm-project/vllm/pull/46408",
    "2026-06-22",
    padding=True,
    expert_map=True,
)
def map_indexed_with_minus_one(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array, places: Array
) -> Array:
    return mixture(x, w_gate, w_up, w_down, places[ids], weights)


@bug(
    "weights-applied-twice",
    "The weights multiply the input before the experts, and the outputs once more after them.",
    "vllm-project/vllm/pull/43694",
    "2026-05-26",
    dtype="bfloat16",
)
def weights_applied_twice(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture((x * weights[:, :1]).astype(x.dtype), w_gate, w_up, w_down, ids, weights)


@bug(
    "weight-of-the-first-slot",
    "Where k is larger than 1, the weight of the first slot multiplies every expert's output.",
    "vllm-project/vllm-xpu-kernels/pull/66",
    "2025-11-11",
)
def weight_of_the_first_slot(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture(x, w_gate, w_up, w_down, ids, np.broadcast_to(weights[:, :1], weights.shape))


@bug(
    "sums-in-float16",
    "The products of a quantised mixture are added in float16, by default.",
    "microsoft/onnxruntime/pull/29166",
    "2026-06-19",
    dtype="float16",
)
def sums_in_float16(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture_with(x, w_gate, w_up, w_down, ids, weights, product=product_in_float16)


def product_in_float16(rows: Array, matrix: Array) -> Array:
    """rows times the transpose of a matrix, each partial sum in float16."""
    total = np.zeros((len(rows), len(matrix)), np.float16)
    with np.errstate(all="ignore"):
        for column in range(rows.shape[1]):
            total += rows[:, column : column + 1].astype(np.float16) * matrix[:, column].astype(np.float16)
    return total


def mixture_with(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array, product: Callable[..., Array]
) -> Array:
    """A mixture with a product of one's own."""
    total = np.zeros(x.shape, np.float32)
    for number in np.unique(ids):
        tokens, slots = np.nonzero(ids == number)
        gate, up = (wide(product(x[tokens], each[number])) for each in (w_gate, w_up))
        hidden = swiglu(gate, up).astype(x.dtype)
        np.add.at(total, tokens, wide(weights[tokens, slots])[:, None] * wide(product(hidden, w_down[number])))
    return total.astype(x.dtype)


@bug(
    "down-stored-in-float16",
    "An expert's output is stored in float16 before its weight makes it small, and overflows.",
    "ROCm/hip-ep/pull/672",
    "2026-08-06",
    dtype="bfloat16",
)
def down_stored_in_float16(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    total = np.zeros(x.shape, np.float32)
    for number in np.unique(ids):
        tokens, slots = np.nonzero(ids == number)
        with np.errstate(all="ignore"):
            out = expert(x[tokens], w_gate[number], w_up[number], w_down[number]).astype(np.float16)
            np.add.at(total, tokens, wide(weights[tokens, slots])[:, None] * wide(out))
    return total.astype(x.dtype)


@bug(
    "experts-next-to-each-other",
    "The kernel takes the experts' matrices to lie next to each other, whatever the strides are.",
    "linkedin/Liger-Kernel/pull/1377",
    "2026-08-12",
)
def experts_side_by_side(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    def flat(matrices: Array) -> Array:
        every = np.lib.stride_tricks.as_strided(matrices, (matrices.size,), (matrices.itemsize,))
        return every.reshape(matrices.shape)

    return mixture(x, flat(w_gate), flat(w_up), flat(w_down), ids, weights)


@bug(
    "output-times-zero",
    "Tiles at the edge add 0 times the output's memory, which is NaN where that memory held NaN.",
    "robertknight/rten/pull/81",
    "2024-04-06",
    buffer=True,
)
def output_times_zero(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array, out: Array
) -> None:
    whole = len(x) // 8 * 8
    result = mixture(x, w_gate, w_up, w_down, ids, weights)
    with np.errstate(all="ignore"):
        result[whole:] += 0 * out[whole:]
    out[...] = result


@remembering_bug(
    "packed-weights-kept-by-address",
    "Weights are packed once for each address and shape, so that an update in place is not seen.",
    "sgl-project/sglang/pull/30247",
    "2026-07-21",
)
def packed_weights_kept_by_address() -> Callable[..., Array]:
    packed: dict[tuple[Any, ...], tuple[Array, Array]] = {}

    def of(matrices: Array) -> Array:
        key = (matrices.ctypes.data, matrices.shape, matrices.strides)
        return packed.setdefault(key, (matrices, matrices.copy()))[1]  # the first keeps the address in use

    def kernel(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
        return mixture(x, of(w_gate), of(w_up), of(w_down), ids, weights)

    return kernel


@remembering_bug(
    "weights-of-the-first-call",
    "The views of the weights are made in the first call and used in all later ones of the same shape.",
    "flashinfer-ai/flashinfer/pull/3066",
    "2026-04-14",
)
def weights_of_the_first_call() -> Callable[..., Array]:
    views: dict[tuple[int, ...], list[Array]] = {}

    def kernel(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
        gate, up, down = views.setdefault(w_gate.shape, [w_gate, w_up, w_down])
        return mixture(x, gate, up, down, ids, weights)

    return kernel


@remembering_bug(
    "order-kept-by-shape",
    "Row indices are kept by the shape of the ids and used again for other ids of that shape.",
    "sgl-project/sglang/pull/28676",
    "2026-06-18",
)
def order_kept_by_shape() -> Callable[..., Array]:
    kept: dict[tuple[int, ...], Array] = {}

    def kernel(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
        ids = kept.setdefault((*ids.shape, len(w_gate)), ids.copy())
        return mixture(x, w_gate, w_up, w_down, ids, weights)

    return kernel


@bug(
    "padding-that-is-not-zero",
    "The inner size is padded to the tile in memory that is not set to zero, and every expert adds it.",
    "vllm-project/vllm/pull/55251",
    "2026-09-07",
)
def padding_that_is_not_zero(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    missing = -w_gate.shape[1] % 16
    held = 0.5
    rows, columns = ((0, 0), (0, missing), (0, 0)), ((0, 0), (0, 0), (0, missing))
    gate, up = (np.pad(each, rows, constant_values=held) for each in (w_gate, w_up))
    return mixture(x, gate, up, np.pad(w_down, columns, constant_values=held), ids, weights)


@bug(
    "interleaved-read-as-halves",
    "Gate and up in turn are read as one after the other.",
    "ROCm/aiter/issues/5760",
    "2026-09-22",
    fused="interleaved",
)
def interleaved_read_as_halves(x: Array, w_gate_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    half = w_gate_up.shape[1] // 2
    return mixture(x, w_gate_up[:, :half], w_gate_up[:, half:], w_down, ids, weights)


@bug(
    "halves-read-as-pairs",
    "Gate and up one after the other are read as pairs.",
    "ROCm/ATOM/pull/885",
    "2026-05-22",
    fused="halves",
)
def halves_read_as_pairs(x: Array, w_gate_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture(x, w_gate_up[:, ::2], w_gate_up[:, 1::2], w_down, ids, weights)


@bug(
    "up-before-gate",
    "The kernel takes up before gate, the loader puts gate first: silu is applied to the wrong one.",
    "sgl-project/sglang/pull/32430",
    "2026-07-26",
    fused="halves",
)
def up_before_gate(x: Array, w_gate_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    half = w_gate_up.shape[1] // 2
    return mixture(x, w_gate_up[:, half:], w_gate_up[:, :half], w_down, ids, weights)


@bug(
    "truncated-to-bfloat16",
    "float32 becomes bfloat16 by dropping 16 bits, which makes every value smaller.",
    "ROCm/aiter/issues/5151",
    "2026-08-31",
    dtype="bfloat16",
)
def truncated_to_bfloat16(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return truncated(mixture(wide(x), wide(w_gate), wide(w_up), wide(w_down), ids, weights)).astype(x.dtype)


def truncated(values: Array) -> Array:
    """float32 values without the last 16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


@bug(
    "global-ids-on-a-rank",
    "The map from all experts to those here is not used: ids beyond the experts here are dropped.",
    "vllm-project/vllm-gaudi/pull/1796",
    "2026-09-14",
    expert_map=True,
)
def global_ids_on_a_rank(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array, places: Array
) -> Array:
    return mixture(x, w_gate, w_up, w_down, np.where(ids < len(w_gate), ids, -1), weights)


@bug(
    "replicated-expert-added-twice",
    "An expert that is replicated runs once for each replica, and all of these are added.",
    "sgl-project/sglang/pull/32962",
    "2026-07-30",
    expert_map=True,
)
def replicated_expert_added_twice(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array, places: Array
) -> Array:
    hot = np.where(places == 0, 0, -1)
    whole, again = (mapped(x, w_gate, w_up, w_down, ids, weights, each) for each in (places, hot))
    return whole + again


@bug(
    "padding-runs-a-garbage-expert",
    "Slots of padding are not marked, so that the kernel runs whatever expert their memory names.",
    "sgl-project/sglang/pull/24850",
    "2026-05-09",
    padding=True,
)
def padding_runs_a_garbage_expert(
    x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array
) -> Array:
    return mixture(x, w_gate, w_up, w_down, np.where(ids < 0, len(w_gate) // 2, ids), weights)


@bug(
    "masked-by-a-product",
    "What must not count is multiplied by 0, which leaves NaN as NaN.",
    "vllm-project/vllm/pull/41249",
    "2026-04-29",
)
def masked_by_a_product(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    total = np.zeros(x.shape, np.float32)
    for number in range(len(w_gate)):
        share = np.where(ids == number, weights, 0).sum(axis=1, keepdims=True)
        total += share * expert(x, w_gate[number], w_up[number], w_down[number])
    return total


@bug(
    "split-by-the-batch",
    "The number of parts of a sum depends on the number of tokens, although the kernel is declared not to depend on "
    "the batch.",
    "vllm-project/vllm/pull/36488",
    "2026-03-09",
    batch_invariant=True,
)
def split_by_the_batch(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    count = 1 if len(x) > 1 else 4

    def product(rows: Array, matrix: Array) -> Array:
        step = -(-rows.shape[1] // count)
        parts = [
            np.einsum("nd,fd->nf", rows[:, start : start + step], matrix[:, start : start + step])
            for start in range(0, rows.shape[1], step)
        ]
        return sum(parts[1:], parts[0])

    return mixture_with(x, w_gate, w_up, w_down, ids, weights, product=product)
