# SPDX-License-Identifier: Apache-2.0
"""Norm, rotation, activation, and the stored dtypes that all kernels share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda.laws import rms_norm_law, rotate_law, same_bits, swiglu_law
from tests.cuda.on_cpu import DTYPES, in_every_order, kernels, needs_compiler, stored
from tests.cuda.runner.module import Conditions

pytestmark = needs_compiler
DTYPE = st.sampled_from(sorted(DTYPES))
SEED = st.integers(0, 2**32)


@given(st.integers(0, 4), st.sampled_from([1, 7, 8, 9, 100, 255, 2048, 2049, 4100]), DTYPE, SEED, st.integers(-12, 12))
@settings(max_examples=25)
def test_rows_have_unit_root_mean_square(rows: int, columns: int, dtype: str, seed: int, scale: int) -> None:
    """NORM-1 to NORM-3, with eps below, at and above the mean square."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, columns)) * 2.0**scale).astype(DTYPES[dtype])
    rms_norm_law(in_every_order, x, stored(rng, (columns,), dtype), 1e-5)


@given(st.integers(0, 4), st.integers(1, 5), st.sampled_from([1, 3, 8, 9, 16, 33, 64]), DTYPE, SEED)
@settings(max_examples=30)
def test_rotation_is_the_specs_in_float32(tokens: int, heads: int, half: int, dtype: str, seed: int) -> None:
    """ROPE-3 to ROPE-5, to the bit."""
    rng = np.random.default_rng(seed)
    angles = rng.random((tokens, half)) * 7
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    rotate_law(in_every_order, stored(rng, (tokens, heads, 2 * half), dtype), cosine, sine)


@given(st.integers(0, 3), st.sampled_from([1, 7, 8, 9, 100, 2047, 2048, 2049]), DTYPE, SEED)
@settings(max_examples=20)
def test_activation_is_gated(rows: int, columns: int, dtype: str, seed: int) -> None:
    """EXPERT-2."""
    rng = np.random.default_rng(seed)
    gate, up = ((rng.standard_normal((rows, columns)) * 4).astype(DTYPES[dtype]) for _ in range(2))
    swiglu_law(in_every_order, gate, up)


def test_activation_of_large_gates_is_zero_or_linear() -> None:
    """exp overflows or vanishes without a NaN."""
    gate = np.array([[-3e38, -1000, -90, 90, 1000, 3e38, -0.0, 0.0]], np.float32)
    out = in_every_order(lambda kernels: kernels.swiglu(gate, np.ones_like(gate)))
    assert out[0].tolist() == [0, 0, 0, *gate[0, 3:6].tolist(), 0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("flush", [False, True])
def test_every_stored_value_is_read_and_written_back(dtype: str, flush: bool) -> None:
    """All 65536 values, rotated by an angle of zero. Only bfloat16 has subnormals that float32 flushes."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = np.concatenate([bits, np.zeros_like(bits)]).view(DTYPES[dtype]).reshape(1, 1, -1)
    cosine, sine = np.ones((1, 1 << 16), np.float32), np.zeros((1, 1 << 16), np.float32)
    out = kernels(Conditions(flush=flush)).rotate(x, cosine, sine)[0, 0, : 1 << 16]
    expected = bits.view(DTYPES[dtype]).copy()
    if flush and dtype == "bfloat16":
        expected[(bits & 0x7F80) == 0] = 0.0
        out[(bits & 0x7F80) == 0] += 0  # the sign of a flushed number does not matter
    assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype: str) -> None:
    """All upper halves of a float32, with lower halves below, at and above every tie."""
    upper = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    cosine = (upper | lower).reshape(1, -1).view(np.float32)
    n = cosine.shape[1]
    x = np.concatenate([np.ones(n), np.zeros(n)]).astype(DTYPES[dtype]).reshape(1, 1, -1)
    out = kernels(Conditions()).rotate(x, cosine, np.zeros_like(cosine))[0, 0, :n]
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_bits(out, cosine[0].astype(DTYPES[dtype]))
