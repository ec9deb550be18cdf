# SPDX-License-Identifier: Apache-2.0
"""The device memory of a model, by hand for a published size, and in the extremes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refmoe.checkpoints.size import total_parameters
from refmoe.cuda.memory import (
    LIBRARIES,
    Need,
    buffer_bytes,
    by_layers,
    cache_bytes,
    kept_itemsize,
    missing,
    resident,
    widest,
)
from refmoe.spec.config import PRESETS

LARGE = PRESETS["mixtral-8x7b"]
GIB = 1 << 30


def test_the_published_size_by_hand() -> None:
    """46,702,792,704 parameters; 32 layers of 8 heads of 128 elements, keys and values."""
    need = resident(LARGE, 2048, 64, "bfloat16", "float32")
    assert need.weights == 2 * 46_702_792_704
    assert cache_bytes(LARGE) == 32 * 2 * 8 * 128 * 4
    assert need.cache == (2048 + 64) * 32 * 2 * 8 * 128 * 4
    assert need.buffers >= 32 * 2048 * 2112 * 4 + LIBRARIES
    assert need.total == need.weights + need.cache + need.buffers
    assert need.total < 141 * 10**9, "an H200 holds it"
    assert resident(LARGE, 1, 0, "bfloat16", "float64").cache == 2 * cache_bytes(LARGE)


@pytest.mark.parametrize(
    ("stored", "dtype", "size"),
    [("bfloat16", "float32", 2), ("float32", "float32", 4), ("float64", "float32", 4), ("float64", "float64", 8),
     ("bfloat16", "exact", 8), ("float32", "float64", 4)],
)  # fmt: skip
def test_weights_stay_as_they_are_stored_but_for_what_kernels_do_not_read(stored: str, dtype: str, size: int) -> None:
    assert kept_itemsize(stored, dtype) == size


def test_layer_by_layer_takes_a_part_of_the_weights() -> None:
    calls = [(100, 0), (1, 100)]
    need = by_layers(LARGE, calls, "bfloat16", "float32")
    assert need.weights == 2 * 3 * 8 * 14336 * 4096
    assert need.weights * LARGE.layers < 2 * total_parameters(LARGE)
    assert need.cache == cache_bytes(LARGE) // 32 * 101
    assert by_layers(LARGE, calls, "bfloat16", "exact").weights == 8 * 3 * 14336 * 4096
    vocabulary = replace(LARGE, vocab=10**6)
    assert by_layers(vocabulary, calls, "bfloat16", "float32").weights == 2 * 10**6 * 4096


def test_buffers_grow_with_every_dimension() -> None:
    base = buffer_bytes(LARGE, 64, 64 * 64, "float32")
    assert buffer_bytes(LARGE, 128, 64 * 64, "float32") > base
    assert buffer_bytes(LARGE, 64, 4096 * 4096, "float32") > base
    assert buffer_bytes(LARGE, 64, 64 * 64, "float64") > base


def test_what_is_missing_is_said_to_the_byte_that_decides() -> None:
    need = Need(3 * GIB, 2 * GIB, GIB)
    assert missing(need, 6 * GIB) is None
    assert missing(need, 5 * GIB) == (
        "6.00 GiB of device memory are needed (weights 3.00 GiB, cache 2.00 GiB, buffers 1.00 GiB), but 5.00 GiB are "
        "free: 1.00 GiB are missing"
    )
    assert missing(need, 6 * GIB - 1) is not None


def test_the_widest_dtype_counts() -> None:
    assert widest(["BF16"]) == "bfloat16"
    assert widest(["BF16", "F32", "F16"]) == "float32"
