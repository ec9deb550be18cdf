# SPDX-License-Identifier: Apache-2.0
"""Every kernel: its file, its arguments, its launch and its limit of registers.

The contracts are in the `.cu` files. `tests/cuda` checks this table against them: it compiles each kernel for every
architecture and runs it on a CPU.
"""

from __future__ import annotations

from refmoe.cuda.kernels.kernel import STORED, WARP, Kernel, Sizes, blocks_of

MOST_EXPERTS = 256
MOST_SLOTS = WARP
PAIRS = 256
PIECE = 8
"""As in the `.cu` files: the most experts and slots, pairs per block of the permutation, elements per thread."""


def _pair_blocks(sizes: Sizes) -> tuple[int, ...]:
    return (sizes["blocks"],)


def _warp_per_output(sizes: Sizes) -> tuple[int, ...]:
    return blocks_of(sizes["outputs"], 256 // WARP), sizes["tokens"] * sizes["k"]


ROUTE = Kernel(
    "routing.cu", "route",
    {"logits": "T[tokens, experts]", "chosen": "int32[tokens, k]", "weights": "float32[tokens, k]",
     "tokens": "int32", "experts": "int32", "k": "int32"},
    block=128, grid=lambda sizes: (blocks_of(sizes["tokens"], 128 // WARP),), registers=48, dtypes=STORED,
    limits={"experts": MOST_EXPERTS, "k": MOST_SLOTS},
)  # fmt: skip

COUNT_PAIRS = Kernel(
    "permutation.cu", "count_pairs",
    {"chosen": "int32[pairs]", "counts": "int32[experts, blocks]",
     "pairs": "int32", "experts": "int32", "blocks": "int32"},
    block=PAIRS, grid=_pair_blocks, registers=56, limits={"experts": MOST_EXPERTS},
)  # fmt: skip

SCAN_COUNTS = Kernel(
    "permutation.cu", "scan_counts",
    {"counts": "int32[experts, blocks]", "offsets": "int32[experts+1]", "experts": "int32", "blocks": "int32"},
    block=PAIRS, grid=lambda sizes: (1,), registers=40,
)  # fmt: skip

PLACE_PAIRS = Kernel(
    "permutation.cu", "place_pairs",
    {"chosen": "int32[pairs]", "starts": "int32[experts, blocks]", "order": "int32[pairs]", "position": "int32[pairs]",
     "pairs": "int32", "experts": "int32", "blocks": "int32"},
    block=PAIRS, grid=_pair_blocks, registers=32, limits={"experts": MOST_EXPERTS},
)  # fmt: skip

GATHER_ROWS = Kernel(
    "rows.cu", "gather_rows",
    {"x": "T[tokens, columns]", "order": "int32[pairs]", "out": "T[pairs, columns]", "columns": "int32", "k": "int32"},
    block=256, grid=lambda sizes: (sizes["pairs"],), registers=40, dtypes=STORED,
)  # fmt: skip

COMBINE = Kernel(
    "rows.cu", "combine",
    {"outputs": "T[pairs, columns]", "position": "int32[tokens, k]", "weights": "float32[tokens, k]",
     "out": "T[tokens, columns]", "columns": "int32", "k": "int32"},
    block=256, grid=lambda sizes: (sizes["tokens"],), registers=48, dtypes=STORED,
)  # fmt: skip

EXPERT_HIDDEN = Kernel(
    "experts.cu", "expert_hidden",
    {"w1": "T[experts, outputs, inputs]", "w3": "T[experts, outputs, inputs]", "x": "float32[tokens, inputs]",
     "chosen": "int32[tokens, k]", "gate": "float32[tokens, k, outputs]", "up": "float32[tokens, k, outputs]",
     "hidden": "float32[tokens, k, outputs]", "inputs": "int32", "outputs": "int32", "k": "int32"},
    block=256, grid=_warp_per_output, registers=64, dtypes=STORED,
)  # fmt: skip

EXPERT_OUTPUT = Kernel(
    "experts.cu", "expert_output",
    {"w2": "T[experts, outputs, inputs]", "hidden": "float32[tokens, k, inputs]", "chosen": "int32[tokens, k]",
     "output": "float32[tokens, k, outputs]", "inputs": "int32", "outputs": "int32"},
    block=256, grid=_warp_per_output, registers=56, dtypes=STORED,
)  # fmt: skip

RMS_NORM = Kernel(
    "norm.cu", "rms_norm",
    {"x": "T[rows, columns]", "gain": "T[columns]", "out": "T[rows, columns]", "columns": "int32", "eps": "float32"},
    block=256, grid=lambda sizes: (sizes["rows"],), registers=48, dtypes=STORED,
)  # fmt: skip

ROTATE = Kernel(
    "rotary.cu", "rotate",
    {"x": "T[tokens, heads, 2*half]", "cosine": "float32[tokens, half]", "sine": "float32[tokens, half]",
     "out": "T[tokens, heads, 2*half]", "tokens": "int32", "heads": "int32", "half": "int32"},
    block=256, registers=56, dtypes=STORED,
    grid=lambda sizes: (blocks_of(sizes["tokens"] * sizes["heads"] * blocks_of(sizes["half"], PIECE), 256),),
)  # fmt: skip

SWIGLU = Kernel(
    "swiglu.cu", "swiglu",
    {"gate": "T[n]", "up": "T[n]", "out": "T[n]", "n": "int64"},
    block=256, grid=lambda sizes: (blocks_of(sizes["n"], 256 * PIECE),), registers=40, dtypes=STORED,
)  # fmt: skip

KERNELS = (
    ROUTE, COUNT_PAIRS, SCAN_COUNTS, PLACE_PAIRS, GATHER_ROWS, COMBINE, EXPERT_HIDDEN, EXPERT_OUTPUT, RMS_NORM, ROTATE,
    SWIGLU,
)  # fmt: skip
