# SPDX-License-Identifier: Apache-2.0
"""Bugs of dispatch plans."""

from __future__ import annotations

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.bugs.kernels.bug import bug
from refmoe.bugs.kernels.honest import align


@bug(
    "all-slots-but-the-first-dropped",
    "Only the first slot is placed; all others are the number that fills blocks.",
    "vllm-project/vllm-xpu-kernels/issues/453",
    "2026-07-08",
    "plan",
)
def all_slots_but_the_first_dropped(ids: Array, block: int, experts: int) -> tuple[Array, Array, Array]:
    slots, owners, total = align(ids, block, experts)
    slots[1:] = ids.size
    return slots, owners, total


@bug(
    "minus-one-as-an-index",
    "An id of -1 is used as an index, which counts its slot for the last expert.",
    "vllm-project/vllm-xpu-kernels/issues/571",
    "2026-09-03",
    "plan",
    padding=True,
)
def minus_one_as_an_index(ids: Array, block: int, experts: int) -> tuple[Array, Array, Array]:
    return align(np.where(ids < 0, experts - 1, ids), block, experts)


@bug(
    "spare-blocks-of-expert-0",
    "Blocks behind the last one are of expert 0 where the product reads -1 as none.",
    "vllm-project/vllm/pull/35161",
    "2026-02-24",
    "plan",
    spare="absent",
)
def spare_blocks_of_expert_0(ids: Array, block: int, experts: int) -> tuple[Array, Array, Array]:
    slots, owners, total = align(ids, block, experts)
    return slots, np.maximum(owners, 0), total
