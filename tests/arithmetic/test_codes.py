# SPDX-License-Identifier: Apache-2.0
"""Codes: those of the package gguf, of llama.cpp's library and of compressed-tensors; those that rounding decides."""

from __future__ import annotations

import ctypes as c
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from refmoe.arithmetic.codes import CODES, InputFormat, quantise
from refmoe.checkpoints.ggml_blocks import FORMATS
from refmoe.engines.adapters import llama_cpp_library as native
from refmoe.profiles.inputs import MATRICES, input_formats
from refmoe.profiles.load import policy

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf not installed: pip install -e '.[test]'")
needs_engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp not installed: pip install -e '.[llama-cpp]'"
)
WIDTH = 512
BYTES = {"q8_0": (8, 34), "q8_1": (9, 36), "q8_k": (15, 292), "q4_0": (2, 18)}
"""llama.cpp's numbers of its formats of inputs and caches, and the bytes of a block."""
TINY = replace(input_formats()["q8_0"], block=4)


def rows(kind: str) -> NDArray[np.float32]:
    """Rows whose scales range over many powers of two, or whose every value lies between two codes exactly."""
    rng = np.random.default_rng(7)
    if kind == "random":
        return (rng.standard_normal((200, WIDTH)) * 2.0 ** rng.integers(-20, 16, (200, 1))).astype(np.float32)
    ties = rng.integers(-126, 127, (100, WIDTH)) + 0.5
    ties[:, ::32] = rng.choice([-127, 127], (100, WIDTH // 32))
    return (ties * 2.0 ** rng.integers(-9, 9, (100, 1))).astype(np.float32)


@needs_gguf
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_without_avx_they_are_those_of_the_package_gguf(kind: str) -> None:
    gguf: Any = import_module("gguf")
    x = rows(kind)
    raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    found = quantise(x, input_formats()["q8_0-half-away"])
    np.testing.assert_array_equal(found.codes.reshape(-1, 32), raw[:, 2:].view(np.int8))
    np.testing.assert_array_equal(found.scales.reshape(-1), raw[:, :2].copy().view(np.float16)[:, 0])


@needs_gguf
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_those_of_four_bits_are_those_of_the_package_gguf(kind: str) -> None:
    """The package keeps them above 8: those of the first 16 values in the low halves of bytes."""
    gguf: Any = import_module("gguf")
    x = rows(kind)
    raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q4_0).reshape(-1, 18)
    found = quantise(x, input_formats()["q4_0"])
    expected = np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], axis=1).astype(np.int8) - 8
    np.testing.assert_array_equal(found.codes.reshape(-1, 32), expected)
    np.testing.assert_array_equal(found.scales.reshape(-1), raw[:, :2].copy().view(np.float16)[:, 0])


@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize(("name", "type_"), [("int8-token-simulated", "int"), ("e4m3-token-simulated", "float")])
def test_those_of_a_token_are_those_that_compressed_tensors_simulates(name: str, type_: str, kind: str) -> None:
    """The library gives codes times scales, rounded to float32."""
    torch: Any = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    library: Any = import_module("compressed_tensors.quantization")
    helpers: Any = import_module("compressed_tensors.quantization.utils")
    forward: Any = import_module("compressed_tensors.quantization.lifecycle.forward")
    arguments = library.QuantizationArgs(num_bits=8, type=type_, strategy="token", symmetric=True, dynamic=True)
    x = rows(kind)
    value = torch.from_numpy(x)[None]
    scale, zero = helpers.compute_dynamic_scales_and_zp(value, arguments, None)
    made = forward.fake_quantize(value, scale, zero, arguments)[0].numpy()
    found = quantise(x, input_formats()[name])
    np.testing.assert_array_equal(found.values.astype(np.float32), made)
    assert len(np.unique(found.codes)) >= 80


@pytest.mark.parametrize(("name", "dtype"), [("e4m3-cache", "float8_e4m3fn"), ("e5m2-cache", "float8_e5m2")])
def test_floats_of_a_cache_are_those_of_ml_dtypes(name: str, dtype: str) -> None:
    """Every value of the format, every middle of two neighbours, and what lies beyond the largest."""
    kind = np.dtype(getattr(ml_dtypes, dtype))
    values = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2, values[[0, -1]] * 1.5, np.spacing(values) + values])
    most = values[-1]
    expected = np.clip(x, -most, most).astype(kind).astype(np.float64)
    np.testing.assert_array_equal(quantise(x[None], input_formats()[name]).values[0], expected)
    toward_zero = [max(values[values <= abs(each)]) * np.sign(each) for each in x]
    truncated = quantise(x[None], input_formats()[f"{name}-truncated"])
    np.testing.assert_array_equal(truncated.values[0], toward_zero)
    assert not truncated.contestable().any()


class Traits(c.Structure):
    """ggml_type_traits_cpu."""

    _fields_ = [("from_float", c.c_void_p), ("dot", c.c_void_p), ("dot_type", c.c_int32), ("rows", c.c_int64)]


def by_llama_cpp(name: str, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The blocks that llama.cpp's library makes of rows: [blocks, bytes]"""
    library = native.load_library(lambda _: None)
    number, size = BYTES[name]
    library.ggml_get_type_traits_cpu.restype = c.POINTER(Traits)
    make = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, c.c_int64)(library.ggml_get_type_traits_cpu(number)[0].from_float)
    block = input_formats()[name].block
    raw = np.zeros((len(x), x.shape[1] // block * size), np.uint8)
    for row, made in zip(x, raw, strict=True):
        make(row.ctypes.data, made.ctypes.data, x.shape[1])
    return raw.reshape(-1, size)


@needs_engine
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("name", BYTES)
def test_they_are_those_of_llama_cpp(name: str, kind: str) -> None:
    x = rows(kind)
    raw, found = by_llama_cpp(name, x), quantise(x, input_formats()[name])
    start = {"q8_0": 2, "q8_1": 4, "q8_k": 4, "q4_0": 2}[name]
    codes = raw[:, start : start + found.width].view(np.int8)
    if name == "q4_0":
        codes = np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], axis=1).astype(np.int8) - 8
    scales = raw[:, :4].copy().view(np.float32) if name == "q8_k" else raw[:, :2].copy().view(np.float16)
    np.testing.assert_array_equal(found.codes.reshape(codes.shape), codes)
    np.testing.assert_array_equal(found.scales.reshape(-1), scales[:, 0])
    if name == "q8_1":
        sums = raw[:, 2:4].copy().view(np.float16)[:, 0]
        np.testing.assert_array_equal(found.sums(WIDTH // 32).reshape(-1), sums)


def other_builds(x: NDArray[np.float32], how: InputFormat) -> list[NDArray[Any]]:
    """The numbers that other kernels of one engine would round to codes: one operation at most is another."""
    blocks = x.reshape(-1, how.block)
    most = np.abs(blocks).max(-1, keepdims=True)
    scale, top = most / np.float32(127), np.float32(127)
    made = [blocks * (top / most), blocks * (np.float32(1) / scale), blocks / scale]
    return [*made, blocks * top / most, blocks.astype(np.float64) * 127 / most]


@settings(max_examples=200)
@given(st.data())
def test_a_code_that_another_build_makes_is_one_of_the_choices(data: st.DataObject) -> None:
    """Values at a boundary, and up to three float32 values away from it."""
    most = np.float32(data.draw(st.floats(2.0**-20, 2.0**20, width=32)))
    cells = data.draw(st.lists(st.tuples(st.integers(-126, 125), st.integers(-3, 3)), min_size=3, max_size=3))
    x = np.array([[most, *(np.float32((code + 0.5) / 127) * most for code, _ in cells)]], np.float32)
    for i, (_, steps) in enumerate(cells):
        for _ in range(abs(steps)):
            x[0, i + 1] = np.nextafter(x[0, i + 1], np.float32(np.inf * steps))
    found = quantise(x, TINY)
    contested = np.flatnonzero(found.contestable()[0])
    legal = {tuple(each.codes[0]) for each in [found, *found.alternatives(0, contested)]}
    for made in other_builds(x, TINY):
        for codes in (np.rint(made), np.trunc(made + np.copysign(np.asarray(0.5, made.dtype), made))):
            assert tuple(codes[0].astype(float)) in legal


def test_a_code_far_from_a_boundary_is_not_contestable() -> None:
    x = np.array([[127, 3.25, -8.75, 0, 127, 0.5, -1.5, 3]], np.float32)
    assert quantise(x, TINY).contestable().tolist() == [[False] * 5 + [True, True, False]]


@pytest.mark.parametrize("block", [0, 2, 4, 16, 32])
def test_sums_are_those_of_groups_whatever_shares_a_scale(block: int) -> None:
    """Groups of eight of a row of 32 values."""
    x = np.random.default_rng(block).standard_normal((3, 32)).astype(np.float32)
    found = quantise(x, replace(TINY, block=block))
    expected = [[sum(group) for group in np.split(row, 4)] for row in found.values]
    np.testing.assert_allclose(found.sums(4), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("codes", CODES)
def test_a_row_of_zeros_has_codes_of_zero(codes: str) -> None:
    found = quantise(np.zeros((1, 8), np.float32), replace(TINY, codes=codes))
    assert not found.codes.any()
    assert not found.scales.any()
    assert not found.unknown.any()


def test_scales_that_no_float16_holds_are_not_known() -> None:
    """127 times the largest float16 is 8.3 million. Below 2^-100 the reciprocal may overflow."""
    x = np.array([[1e8, 1, 2, 3], [8e6, 1, 2, 3], [2.0**-120, 0, 0, 0]], np.float32)
    assert quantise(x, TINY).unknown.tolist() == [True, False, True]


def test_every_format_of_gguf_has_codes_in_llama_cpp_s_profiles() -> None:
    assert {*FORMATS} <= {*MATRICES}
    for name in ("llama.cpp-float32", "llama.cpp-quantised", "llama.cpp-quantised-sse42", "ik-llama.cpp-quantised"):
        assert {matrix for matrix, how in policy(name).inputs.items() if isinstance(how, InputFormat)} == {*FORMATS}
    for how in input_formats().values():
        assert how.about
        assert how.source
