# SPDX-License-Identifier: Apache-2.0
"""The block formats of GGUF against the formulas of ggml in fractions, the package gguf, and llama.cpp itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from refmoe.checkpoints.ggml_blocks import FORMATS, BlockFormat
from refmoe.checkpoints.ggml_quantise import quantised

INSTALL = "not installed: pip install -e '.[llama-cpp]'"
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason=f"gguf {INSTALL}")
needs_library = pytest.mark.skipif(find_spec("xllamacpp") is None, reason=f"xllamacpp {INSTALL}")
formats = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)

# ---- the formulas of dequantize_row_* in ggml-quants.c, one weight at a time


def half(b: bytes, at: int) -> Fraction:
    return Fraction(float(np.frombuffer(b, "<f2", 1, at)[0]))


def low_or_high(b: bytes, at: int, j: int) -> int:
    """Code j of 32 in 16 bytes."""
    return b[at + j] & 15 if j < 16 else b[at + j - 16] >> 4


def fifth_bit(b: bytes, at: int, j: int) -> int:
    return (int.from_bytes(b[at : at + 4], "little") >> j & 1) << 4


def scale_and_min(b: bytes, g: int) -> tuple[int, int]:
    """`get_scale_min_k4`, with the 12 bytes at 4."""
    q = b[4:16]
    if g < 4:
        return q[g] & 63, q[g + 4] & 63
    return q[g + 4] & 15 | (q[g - 4] >> 6) << 4, q[g + 4] >> 4 | (q[g] >> 6) << 4


def q4_k(b: bytes, j: int) -> Fraction:
    scale, minimum = scale_and_min(b, j // 32)
    byte = b[16 + j // 64 * 32 + j % 32]
    return half(b, 0) * scale * (byte >> 4 if j // 32 % 2 else byte & 15) - half(b, 2) * minimum


def q5_k(b: bytes, j: int) -> Fraction:
    scale, minimum = scale_and_min(b, j // 32)
    byte = b[48 + j // 64 * 32 + j % 32]
    code = (byte >> 4 if j // 32 % 2 else byte & 15) + (16 if b[16 + j % 32] >> j // 32 & 1 else 0)
    return half(b, 0) * scale * code - half(b, 2) * minimum


def q6_k(b: bytes, j: int) -> Fraction:
    n, quarter, lane = j // 128, j % 128 // 32, j % 32
    byte = b[64 * n + 32 * (quarter % 2) + lane]
    low = byte >> 4 if quarter > 1 else byte & 15
    code = (low | (b[128 + 32 * n + lane] >> 2 * quarter & 3) << 4) - 32
    scale = b[192 + j // 16]
    return half(b, 208) * (scale - 256 if scale > 127 else scale) * code


def mxfp4(b: bytes, j: int) -> Fraction:
    code = low_or_high(b, 1, j)
    size = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)][code % 8]
    return (-size if code > 7 else size) * Fraction(2) ** (b[0] - 127)


FORMULAS: dict[str, Callable[[bytes, int], Fraction]] = {
    "Q8_0": lambda b, j: half(b, 0) * int(np.int8(np.uint8(b[2 + j]))),
    "Q4_0": lambda b, j: half(b, 0) * (low_or_high(b, 2, j) - 8),
    "Q4_1": lambda b, j: half(b, 0) * low_or_high(b, 4, j) + half(b, 2),
    "Q5_0": lambda b, j: half(b, 0) * ((low_or_high(b, 6, j) | fifth_bit(b, 2, j)) - 16),
    "Q5_1": lambda b, j: half(b, 0) * (low_or_high(b, 8, j) | fifth_bit(b, 4, j)) + half(b, 2),
    "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "MXFP4": mxfp4,
}  # fmt: skip
SCALES = {"Q6_K": (208,), "MXFP4": (), **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))}
"""Where the float16 numbers of a block lie, if not at 0 alone."""


def values(kind: BlockFormat, raw: NDArray[np.uint8]) -> NDArray[Any]:
    """Weights of rows of blocks."""
    return kind.values(raw.reshape(-1, kind.nbytes)).reshape(len(raw), -1)


def random_blocks(kind: BlockFormat, count: int) -> NDArray[np.uint8]:
    """Random codes, six-bit scales and exponents, with float16 scales of the size of a model's."""
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    for at in SCALES.get(kind.name, (0,)):
        raw[:, at : at + 2] = (rng.standard_normal((count, 1)) * 2.0**-14).astype("<f2").view(np.uint8)
    if kind.name == "MXFP4":
        raw[:, 0] = rng.integers(0, 250, count)
    return raw


def bits(array: NDArray[Any]) -> NDArray[np.uint32]:
    assert array.dtype == np.float32
    return array.view(np.uint32)


@formats
@given(data=st.data())
def test_each_weight_is_the_formula_in_fractions(kind: BlockFormat, data: st.DataObject) -> None:
    """Exactly, or there is no such float32 and the block is refused; never another number."""
    block = data.draw(st.binary(min_size=kind.nbytes, max_size=kind.nbytes))
    floats = [np.frombuffer(block, "<f2", 1, at)[0] for at in SCALES.get(kind.name, (0,))]
    assume(all(np.isfinite(each) for each in floats) and not (kind.name == "MXFP4" and block[0] > 250))
    exact = [FORMULAS[kind.name](block, j) for j in range(kind.size)]
    try:
        found = values(kind, np.frombuffer(block, np.uint8)[None])[0]
    except ValueError:
        assert any(Fraction(float(np.float32(float(each)))) != each for each in exact)
    else:
        assert [Fraction(float(each)) for each in found] == exact


@needs_gguf
@formats
def test_gguf_has_the_same_bits(kind: BlockFormat) -> None:
    gguf: Any = import_module("gguf")
    raw = random_blocks(kind, 3000).reshape(300, -1)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(bits(values(kind, raw)), bits(expected))


@needs_library
@formats
def test_llama_cpp_has_the_same_bits(kind: BlockFormat) -> None:
    """Random blocks, and blocks of its own quantiser."""
    library = ctypes.CDLL(str(import_module("xllamacpp.xllamacpp").__file__))
    function = getattr(library, "dequantize_row_" + kind.name.lower().replace("_k", "_K"))
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    matrix = np.random.default_rng(1).standard_normal((30, 2560)).astype(np.float32) * np.float32(0.05)
    for raw in (random_blocks(kind, 3000).reshape(300, -1), quantised(matrix, kind.name)):
        expected = np.empty((len(raw), raw.shape[1] // kind.nbytes * kind.size), np.float32)
        function(raw.ctypes.data, expected.ctypes.data, expected.size)
        np.testing.assert_array_equal(bits(values(kind, raw)), bits(expected))


@formats
def test_a_scale_that_is_no_number_makes_no_number(kind: BlockFormat) -> None:
    """float16's NaN and infinity, and E8M0's NaN."""
    raw = random_blocks(kind, 2)
    if kind.name == "MXFP4":
        raw[1, 0] = 255
    else:
        for at in SCALES.get(kind.name, (0,)):
            raw[:, at : at + 2] = np.array([np.nan, np.inf], "<f2").view(np.uint8).reshape(2, 2)
    assert not np.isfinite(values(kind, raw[1:])).all()
    assert kind.name == "MXFP4" or not np.isfinite(values(kind, raw[:1])).any()


def test_bits_of_a_weight() -> None:
    """As ggml's own tables have them."""
    assert {name: kind.bits for name, kind in FORMATS.items()} == {
        "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625,
        "MXFP4": 4.25,
    }  # fmt: skip


@needs_gguf
@formats
def test_sizes_are_those_of_gguf(kind: BlockFormat) -> None:
    gguf: Any = import_module("gguf")
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.size, kind.nbytes)
