# SPDX-License-Identifier: Apache-2.0
"""Tensor cores without a GPU: the bits of MMA-Sim, and kernels that compute with them.

`tensor_cores.json` has small products as MMA-Sim 2.1.1 computes them, made by `python -m bench.tensor_cores --record`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bench.tensor_cores import DTYPES, Engine, judged
from refmoe.arithmetic.formats import nearest
from refmoe.arithmetic.tensor_core import E4M3, TENSOR_CORES
from refmoe.errors import InputError
from refmoe.testing import assert_linear, assert_tensor_core_linear
from refmoe.testing.tensor_core import UNPROMOTED, judge_tensor_core_linear

RECORDED = json.loads((Path(__file__).parent / "tensor_cores.json").read_text())
CORE = {
    ("Volta", "float16"): "volta-float16", ("Turing", "float16"): "turing-float16",
    ("Ampere", "float16"): "ampere-float16", ("Ada Lovelace", "float16"): "ampere-float16",
    ("Hopper", "float16"): "hopper-float16", ("Blackwell", "float16"): "hopper-float16",
    ("RTX Blackwell", "float16"): "hopper-float16", ("Ampere", "bfloat16"): "ampere-bfloat16",
    ("Ada Lovelace", "bfloat16"): "ampere-bfloat16", ("Hopper", "bfloat16"): "hopper-bfloat16",
    ("Blackwell", "bfloat16"): "hopper-bfloat16", ("RTX Blackwell", "bfloat16"): "hopper-bfloat16",
    ("Ampere", "tf32"): "ampere-tf32", ("Ada Lovelace", "tf32"): "ampere-tf32", ("Hopper", "tf32"): "hopper-tf32",
    ("Blackwell", "tf32"): "hopper-tf32", ("RTX Blackwell", "tf32"): "hopper-tf32",
    ("Ada Lovelace", "float8"): "ada-fp8", ("Hopper", "float8"): "hopper-fp8-fast",
    ("Blackwell", "float8"): "blackwell-fp8", ("RTX Blackwell", "float8"): "blackwell-fp8",
}  # fmt: skip
"""The tensor core that each architecture has for a dtype."""


def unpacked(entry: dict[str, str]) -> tuple[Any, Any, Any]:
    """x [4, 80], w [4, 80] and their product [4, 4]."""
    kinds = {"x": DTYPES[entry["dtype"]], "w": DTYPES[entry["dtype"]], "sums": np.dtype(np.float32)}
    x, w, sums = (np.frombuffer(base64.b64decode(entry[name]), kind) for name, kind in kinds.items())
    return x.reshape(4, -1), w.reshape(4, -1), sums.reshape(4, 4)


def named(entry: dict[str, str]) -> str:
    return f"{entry['architecture']} {entry['dtype']} {entry['instruction']}"


@pytest.mark.parametrize("entry", [each for each in RECORDED if "CDNA" not in each["architecture"]], ids=named)
def test_the_tensor_cores_have_the_bits_of_mma_sim(entry: dict[str, str]) -> None:
    x, w, sums = unpacked(entry)
    core = TENSOR_CORES[CORE[entry["architecture"], entry["dtype"].partition("_")[0]]]
    if entry["dtype"] == "float8_e5m2":
        core = replace(core, inputs=replace(core.inputs, precision=3, exponent_min=-14, exponent_max=15))
    assert np.array_equal(core.run(x.astype(np.float64), w.astype(np.float64).T), sums)


@pytest.mark.parametrize("entry", RECORDED, ids=named)
def test_the_recorded_products_pass_their_policy(entry: dict[str, str]) -> None:
    x, w, sums = unpacked(entry)
    engine = Engine(
        entry["architecture"],
        entry["dtype"],
        entry["instruction"],
        entry["policy"],
        flushes=bool(entry["architecture"] == "CDNA2" and entry["dtype"] == "float16"),
    )
    found = judged(engine, sums, x, w)
    assert found, found.message


def test_every_instruction_is_recorded_that_the_bench_measures() -> None:
    from bench.tensor_cores import ENGINES

    wanted = {
        (each.architecture, each.dtype, each.instruction) for each in ENGINES if not (each.faulty or each.promoted)
    }
    assert {(each["architecture"], each["dtype"], each["instruction"]) for each in RECORDED} == wanted
    assert len(RECORDED) > 30


# ---- kernels on tensor cores


def eight(rng: np.random.Generator, rows: int, terms: int, one_signed: bool = False) -> Any:
    values = rng.standard_normal((rows, terms))
    return np.clip(np.abs(values) if one_signed else values, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def run(core: str, x: Any, w: Any, dtype: Any = np.float32) -> Any:
    return TENSOR_CORES[core].run(x.astype(np.float64), w.astype(np.float64).T).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("one_signed", [False, True])
@pytest.mark.parametrize("core", ["ada-fp8", "hopper-fp8", "hopper-fp8-fast", "blackwell-fp8"])
def test_honest_fp8_kernels_pass(core: str, one_signed: bool, dtype: Any) -> None:
    rng = np.random.default_rng(1)
    x, w = eight(rng, 32, 1024, one_signed), eight(rng, 8, 1024, one_signed)
    assert_tensor_core_linear(run(core, x, w, dtype), x, w, core=core)
    order = np.random.default_rng(2).permutation(1024 // 128)
    other = (order[:, None] * 128 + np.arange(128)).reshape(-1)
    assert_tensor_core_linear(run(core, x[:, other], w[:, other], dtype), x, w, core=core)
    exact = (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.float32).astype(dtype)
    assert_tensor_core_linear(exact, x, w, core=core)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("one_signed", [False, True])
def test_a_missing_promotion_is_named(one_signed: bool, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    x, w = eight(rng, 64, 2048, one_signed), eight(rng, 8, 2048, one_signed)
    found = run("hopper-fp8-fast", x, w, dtype)
    with pytest.raises(AssertionError, match=UNPROMOTED):
        assert_tensor_core_linear(found, x, w, core="hopper-fp8")
    judgement = judge_tensor_core_linear(found, x, w, core="hopper-fp8")
    assert judgement.explanations == (UNPROMOTED,)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["gaussian", "one-signed", "blocks", "alternating"])
def test_no_other_kernel_is_said_to_lack_a_promotion(kind: str, dtype: Any) -> None:
    """Honest ones whose chains have other terms, and one that drops a term."""
    rng = np.random.default_rng(4)
    signs = {"blocks": np.arange(512) < 256, "alternating": np.arange(512) % 2 == 0}.get(kind)
    x, w = eight(rng, 48, 512, kind != "gaussian"), eight(rng, 8, 512, kind != "gaussian")
    if signs is not None:
        x = np.where(signs, x, -x)
    strided = np.arange(512).reshape(-1, 2).T.reshape(-1)
    for found in (
        run("hopper-fp8", x[:, strided], w[:, strided], dtype),
        run("hopper-fp8", x[:, :-1], w[:, :-1], dtype),
    ):
        assert UNPROMOTED not in judge_tensor_core_linear(found, x, w, core="hopper-fp8").explanations


def test_the_general_policy_would_accuse_an_honest_hopper() -> None:
    """So FP8 needs its own: what 13 bits lose is a thousand deviations of float32 sums."""
    rng = np.random.default_rng(5)
    x, w = eight(rng, 32, 2048), eight(rng, 8, 2048)
    found = run("hopper-fp8-fast", x, w)
    with pytest.raises(AssertionError):
        assert_linear(found, *(each.astype(ml_dtypes.bfloat16) for each in (x, w)), policy="bfloat16", explain=False)
    figures = assert_tensor_core_linear(found, x, w, core="hopper-fp8-fast")
    assert figures.deviations < figures.limit / 10


def test_a_wrong_scale_is_caught() -> None:
    rng = np.random.default_rng(6)
    x, w = eight(rng, 32, 2048, True), eight(rng, 8, 2048, True)
    found = run("hopper-fp8", x, w) * np.float32(1 + 2.0**-4)
    assert not judge_tensor_core_linear(found, x, w, core="hopper-fp8")


@pytest.mark.engines
def test_fp8_tensors_of_pytorch_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    x, w = (torch.ones(shape).to(torch.float8_e5m2) for shape in ((2, 64), (3, 64)))
    assert assert_tensor_core_linear(torch.full((2, 3), 64.0), x, w, core="hopper-fp8").values == 6


BAD = {
    "no core": ({}, "core: is None"),
    "an unknown core": ({"core": "pascal"}, "core: is 'pascal'"),
    "values beyond the format": ({"core": "hopper-fp8", "x": np.full((2, 64), 0.3, np.float32)}, "x: has values that"),
    "FP8 for a core of bfloat16": ({"core": "ampere-bfloat16"}, "x: the dtype is float8_e4m3fn"),
    "two FP8 formats": ({"core": "hopper-fp8", "w": np.ones((3, 64), ml_dtypes.float8_e5m2)}, "w: the dtype is"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_get_a_sentence(name: str) -> None:
    changed, sentence = BAD[name]
    given = {"x": np.ones((2, 64), ml_dtypes.float8_e4m3fn), "w": np.ones((3, 64), ml_dtypes.float8_e4m3fn)} | changed
    x, w = given.pop("x"), given.pop("w")
    with pytest.raises(InputError, match=sentence):
        assert_tensor_core_linear(np.full((2, 3), 64, np.float32), x, w, **given)


@pytest.mark.parametrize("name", ["ampere-tf32", "hopper-tf32", "volta-float16", "turing-float16", "hopper-bfloat16"])
def test_long_sums_of_every_core_pass_as_that_core(name: str) -> None:
    """As long as those of an expert of Mixtral 8x7B, where errors that lean add up over thousands of steps."""
    core, rng = TENSOR_CORES[name], np.random.default_rng(7)
    x, w = (nearest(rng.standard_t(3, (32, 14336)), core.inputs), nearest(rng.standard_normal((2, 14336)), core.inputs))
    found = core.run(x, w.T).astype(np.float32)
    assert_tensor_core_linear(found, x, w, core=name)


def test_e4m3_holds_the_values_of_its_dtype() -> None:
    """All codes but the two of NaN; the largest is below what a format with this exponent could hold."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    finite = codes[np.isfinite(codes)]
    assert finite.size == 254
    assert np.array_equal(nearest(finite, E4M3), finite)
