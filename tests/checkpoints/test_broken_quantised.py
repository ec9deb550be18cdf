# SPDX-License-Identifier: Apache-2.0
"""Broken quantised models, one of each kind: each is refused with one sentence that names the place and the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.errors import InputError
from refmoe.spec.config import Config
from tests.checkpoints.quantised_folders import VARIANTS, Array, gptq, read_tensors, write, write_tensors

Q = "model.layers.0.self_attn.q_proj"
Damage = Callable[[Path], Any]


def read_all(path: Path) -> None:
    for weight in named_weights(load_checkpoint(path).parameters).values():
        weight.read()


# ---- folders


def says(**fields: Any) -> Damage:
    """Change `quantization_config`."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["quantization_config"] |= fields
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def groups(**fields: Any) -> Damage:
    """Change the weights of the one group of compressed-tensors."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["quantization_config"]["config_groups"]["group_0"]["weights"] |= fields
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def config(value: Any) -> Damage:
    """Replace `quantization_config`."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": value}))

    return damage


def part(name: str, change: Callable[[Array], Array | None]) -> Damage:
    """Change one entry of a query's matrix, or remove it."""

    def damage(folder: Path) -> None:
        tensors = read_tensors(folder / "model.safetensors")
        made = change(np.array(tensors.pop(f"{Q}.{name}")))
        write_tensors(folder / "model.safetensors", tensors | ({} if made is None else {f"{Q}.{name}": made}))

    return damage


def added(name: str, array: Array) -> Damage:
    def damage(folder: Path) -> None:
        tensors = read_tensors(folder / "model.safetensors")
        write_tensors(folder / "model.safetensors", tensors | {f"{Q}.{name}": array})

    return damage


def beside(name: str) -> Damage:
    """Add a number to the attention of the first layer."""

    def damage(folder: Path) -> None:
        tensors = read_tensors(folder / "model.safetensors")
        one = {f"model.layers.0.self_attn.{name}": np.ones(1, np.float32)}
        write_tensors(folder / "model.safetensors", tensors | one)

    return damage


def put(value: Any, at: Any = 0) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array.reshape(-1)[at] = value
        return array

    return change


def gone(array: Array) -> None:
    return None


def no_number(array: Array) -> Array:
    """The first float of eight bits becomes NaN."""
    return put(0x7F)(array.view(np.uint8)).view(array.dtype)


INT4 = VARIANTS["ct-int4-group"].config
FOLDERS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "no object": ("fp8-block", config("fp8"), ("'quantization_config' is \"fp8\"", "object")),
    "no method": ("fp8-block", config({"bits": 4}), ("'quantization_config.quant_method' is missing",)),
    "another method": ("gptq", says(quant_method="exl2"), ("quant_method' is \"exl2\"", "gptq")),
    "a method of numbers": ("gptq", says(quant_method=[1]), ("quant_method' is [1]",)),
    "a list of no names": ("fp8-block", says(modules_to_not_convert=[3]), ("modules_to_not_convert' is [3]",)),
    "blocks of three": ("fp8-block", says(weight_block_size=[128, 128, 1]), ("weight_block_size", "two positive")),
    "blocks of nothing": ("fp8-block", says(weight_block_size=[0, 128]), ("weight_block_size' is [0, 128]",)),
    "another block": ("fp8-block", says(weight_block_size=[64, 64]), ("weight_scale_inv' has shape [2, 1]", "[3, 2]")),
    "blocks, but it says one scale": ("fp8-block", says(weight_block_size=None), ("weight_scale_inv' has shape",)),
    "e5m2": ("fp8-block", says(fmt="e5m2"), ("fmt' is \"e5m2\"",)),
    "no scale": ("fp8-block", part("weight_scale_inv", gone), ("q_proj.weight' is not quantised", "config.json")),
    "float codes": (
        "fp8-block", part("weight", lambda array: array.astype(np.float32)), ("weight' has dtype F32", "F8_E4M3"),
    ),
    "no codes": ("fp8-block", part("weight", gone), ("beside tensor", "'weight' is missing")),
    "a scale that is no number": ("fp8-block", part("weight_scale_inv", put(np.nan)), ("the first is nan",)),
    "an infinite scale": ("fp8-block", part("weight_scale_inv", put(np.inf)), ("not finite",)),
    "a code that is no number": ("fp8-block", part("weight", no_number), ("1 value that is not finite",)),
    "an integer scale": (
        "fp8-block", part("weight_scale_inv", lambda array: array.astype(np.int32)), ("dtype I32", "BF16"),
    ),
    "left out, yet quantised": ("fp8-block", says(modules_to_not_convert=[Q]), (Q, "is not quantised")),
    "quantised, and no word of it": ("fp8-block", config(None), ("q_proj.weight' has dtype F8_E4M3",)),
    "a zero point too many": (
        "fp8-block", added("weight_zero_point", np.zeros(2, np.int8)), ("weight_zero_point' was not expected",),
    ),
    "int8 for fp8": ("ct-float-channel", groups(type="int"), ("dtype F8_E4M3", "I8")),
    "still being made": ("ct-int4-group", says(quantization_status="frozen"), ("quantization_status' is \"frozen\"",)),
    "sparse": ("ct-int4-group", says(sparsity_config={"format": "sparse-24"}), ("sparsity_config",)),
    "a cache": ("ct-int4-group", says(kv_cache_scheme={"num_bits": 8}), ("kv_cache_scheme", "not quantised")),
    "a cache of FP8": ("fp8-block", says(kv_cache_scheme="static"), ("kv_cache_scheme", "not quantised")),
    "a cache of GPTQ": ("gptq", says(kv_cache_quant_method="fp8"), ("kv_cache_quant_method", "not quantised")),
    **{
        f"a scale of a cache, {name}": (variant, beside(name), (f"self_attn.{name}' belongs to a quantised cache",))
        for variant, name in (
            ("fp8-block", "kv_scale"), ("fp8-block", "v_proj.output_scale"), ("fp8-block", "attn.k_scale"),
            ("ct-float-channel", "k_scale"), ("ct-int4-group", "v_zero_point"), ("awq", "v_scale"),
        )
    },
    "three bits": ("ct-int4-group", groups(num_bits=3), ("num_bits' is 3", "4 or 8")),
    "no groups": ("ct-int4-group", says(config_groups={}), ("config_groups",)),
    "a format of others": ("ct-int4-group", says(format="marlin-24"), ("format' is \"marlin-24\"",)),
    "a channel in groups": ("ct-int4-group", groups(strategy="channel"), ("strategy' is \"channel\"", "group_size")),
    "a group of nothing": ("ct-int4-group", groups(group_size=0), ("group_size' is 0",)),
    "another group": ("ct-int4-group", groups(group_size=64), ("weight_scale' has shape", "int4-group64")),
    "no zero points": ("ct-int4-group", groups(symmetric=False), ("'weight_zero_point' is missing",)),
    "zero points, but it says none": ("ct-int4-zeros", groups(symmetric=True), ("weight_zero_point' was not",)),
    "no groups of inputs": ("ct-int4-group", groups(actorder="group"), ("'weight_g_idx' is missing",)),
    "a shape that overflows": (
        "ct-int4-group", part("weight_shape", lambda array: array * 0 + (1 << 62)), ("weight_packed' has shape",),
    ),
    "a negative shape": ("ct-int4-group", part("weight_shape", put(-256)), ("'weight_shape' is [-256, 128]",)),
    "no shape": ("ct-int4-group", part("weight_shape", gone), ("'weight_shape' is missing",)),
    "no pattern": ("ct-int4-group", says(ignore=["re:("]), ("ignore' is \"re:(\"", "regular expression")),
    "an endless pattern": ("ct-int4-group", says(ignore=["re:(a+)+$"]), ("ignore", "repetitions")),
    "nothing says how": (
        "ct-int4-group", says(config_groups={"g": INT4["config_groups"]["group_0"] | {"targets": ["re:.*w1"]}}),
        ("is there, but config.json says nothing about model.layers.0",),
    ),
    "version 1 said to be 2": ("gptq", says(checkpoint_format="gptq_v2"), ("zero point 7", "8 was expected", "'sym'")),
    "version 2 said to be 1": ("gptq-v2", says(checkpoint_format="gptq"), ("zero point 9", "8 was expected")),
    "two versions": ("gptq", says(checkpoint_format="gptq", format="gptq_v2"), ("format' is \"gptq_v2\"",)),
    "the largest zero point": (
        "gptq-v1-zeros", part("qzeros", put(-1)), ("qzeros' holds the largest zero point", "engines differ"),
    ),
    "in order, it says": ("gptq-act-order", says(desc_act=False), ("g_idx' has groups in another order", "desc_act")),
    "no order": ("gptq-act-order", part("g_idx", gone), ("'g_idx' is missing",)),
    "a group that is not there": ("gptq-act-order", part("g_idx", put(9)), ("g_idx' has groups from 0 to 9", "0 to 3")),
    "a negative group": ("gptq-act-order", part("g_idx", put(-1)), ("g_idx' has groups from -1",)),
    "eight bits, it says": ("gptq", says(bits=8), ("scales' has shape", "gptq-int8-group32")),
    "two bits": ("gptq", says(bits=2), ("bits' is 2",)),
    "several schemes": ("gptq", says(dynamic={"-:x": {}}), ("dynamic",)),
    "no size of groups": ("gptq", config({"quant_method": "gptq", "bits": 4}), ("group_size' is missing",)),
    "another size of groups": ("gptq", says(group_size=64), ("scales' has shape [4, 160]", "[2, 160]")),
    "marlin": ("gptq", says(is_marlin_format=True), ("is_marlin_format' is true",)),
    "another layout of AWQ": ("awq", says(version="gemv"), ("version' is \"gemv\"", "gemm")),
    "AWQ without zero points": ("awq", says(zero_point=False), ("zero_point' is false",)),
    "cut zero points": ("awq", part("qzeros", lambda array: array[:-1]), ("qzeros' has shape [3, 32]", "[4, 32]")),
    "a vector of words": ("awq", part("qweight", lambda array: array.reshape(-1)), ("two axes",)),
    "AWQ's order in GPTQ": ("awq", added("g_idx", np.zeros(128, np.int32)), ("g_idx' was not expected",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_contradicts_itself_is_one_sentence(kind: str, tmp_path: Path) -> None:
    variant, damage, words = FOLDERS[kind]
    write(tmp_path, VARIANTS[variant])
    read_all(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        read_all(tmp_path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(str(tmp_path))
    for word in words:
        assert word in sentence


def test_zero_points_of_both_versions_are_told_apart_only_where_the_folder_says_more(tmp_path: Path) -> None:
    """Without `sym`, nothing contradicts version 2, and its numbers are others."""
    variant = replace(VARIANTS["gptq-v1-zeros"], quantise=gptq(32, symmetric=False))
    write(tmp_path, variant)
    first = named_weights(load_checkpoint(tmp_path).parameters)["layers.0.attention.wq"].read()
    says(checkpoint_format="gptq_v2")(tmp_path)
    second = named_weights(load_checkpoint(tmp_path).parameters)["layers.0.attention.wq"].read()
    assert (first != second).all()


# ---- GGUF

CONFIG = Config(
    dim=64, layers=1, heads=2, kv_heads=1, head_dim=32, hidden_dim=96, vocab=37, experts=2, experts_per_token=1,
    norm_eps=2.0**-17, rope_theta=3e4,
)  # fmt: skip
GATE = "blk.0.ffn_gate_exps.weight"


def reader_of(path: Path) -> Any:
    return import_module("gguf").GGUFReader(path)


def overwrite(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


def of_tensor(name: str, field: str, data: bytes) -> Damage:
    """Overwrite a part of the table of tensors: ``axes``, ``dims``, ``type`` or ``offset``."""

    def damage(path: Path) -> None:
        (tensor,) = (each for each in reader_of(path).tensors if each.name == name)
        place = ["name length", "name", "axes", "dims", "type", "offset"].index(field)
        overwrite(path, tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:place]), data)

    return damage


def of_field(name: str, place: int, data: bytes) -> Damage:
    """Overwrite a part of a field of the metadata: 2 is its type, 3 a scalar's value."""

    def damage(path: Path) -> None:
        field = reader_of(path).fields[name]
        overwrite(path, field.offset + sum(part.nbytes for part in field.parts[:place]), data)

    return damage


def of_data(name: str, data: bytes, at: int = 0) -> Damage:
    def damage(path: Path) -> None:
        (tensor,) = (each for each in reader_of(path).tensors if each.name == name)
        overwrite(path, tensor.data_offset + at, data)

    return damage


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def cut(size: int) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


TOKENS = "tokenizer.ggml.tokens"
FILES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "only the mark": (cut(4), ("GGUF",)),
    "a cut header": (cut(100), ("the file ends",)),
    "a cut table": (cut(9000), ("GGUF",)),
    "a cut block": (lambda path: cut(path.stat().st_size - 7)(path), ("GGUF",)),
    "another version": (lambda path: overwrite(path, 4, u32(9)), ("version 9",)),
    "the other byte order": (lambda path: overwrite(path, 4, u32(3)[::-1]), ("GGUF",)),
    "2^60 fields": (lambda path: overwrite(path, 16, u64(1 << 60)), ("GGUF",)),
    "2^60 tensors": (lambda path: overwrite(path, 8, u64(1 << 60)), ("GGUF",)),
    "an array of 2^60": (of_field(TOKENS, 4, u64(1 << 60)), (f"{1 << 60} elements",)),
    "an array of 4,000,000": (of_field(TOKENS, 4, u64(4_000_000)), ("GGUF",)),
    "a text of 2^60": (of_field("general.architecture", 3, u64(1 << 60)), ("GGUF",)),
    "2^31 axes": (of_tensor(GATE, "axes", u32(1 << 31)), ("GGUF",)),
    "sizes that overflow": (of_tensor(GATE, "dims", u64(64, 1 << 62, 1 << 62)), ("GGUF",)),
    "sizes that overflow to nothing": (of_tensor(GATE, "dims", u64(1 << 32, 1 << 32, 2)), ("GGUF",)),
    "sizes that overflow to as many": (of_tensor(GATE, "dims", u64(64, (1 << 58) + 96, 2)), ("GGUF",)),
    "rows of half a block": (of_tensor(GATE, "dims", u64(48, 128, 2)), ("GGUF",)),
    "nothing": (of_tensor(GATE, "dims", u64(64, 0, 2)), ("begins at byte",)),
    "other sizes": (of_tensor(GATE, "dims", u64(96, 64, 2)), (GATE, "shape [2, 64, 96]", "[2, 96, 64]")),
    "no type": (of_tensor(GATE, "type", u32(999)), ("999",)),
    "a type that is not read": (of_tensor(GATE, "type", u32(20)), (GATE, "type IQ4_NL", "Q4_K")),
    "an offset beyond the end": (of_tensor(GATE, "offset", u64(1 << 40)), ("GGUF",)),
    "an offset that overflows": (of_tensor(GATE, "offset", u64((1 << 64) - 32)), ("begins at byte",)),
    "the place of another tensor": (of_tensor(GATE, "offset", u64(0)), ("begins at byte",)),
    "a scale that is no number": (of_data(GATE, b"\x00\x7e"), (GATE, "32 values that are not finite")),
    "an infinite scale": (of_data(GATE, b"\x00\x7c", 18), (GATE, "not finite")),
    "another model": (of_field("general.architecture", 4, b"gemma"), ("'general.architecture' is \"gemma\"", "llama")),
    "more heads": (of_field("llama.attention.head_count", 3, u32(3)), ("llama.attention.head_count",)),
    "half a head turned": (of_field("llama.rope.dimension_count", 3, u32(16)), ("rope.dimension_count' is 16",)),
    "more experts": (of_field("llama.expert_count", 3, u32(3)), ("ffn_gate_inp.weight", "[3, 64]")),
    "no experts": (of_field("llama.expert_count", 3, u32(0)), ("expert_count",)),
    "more layers": (of_field("llama.block_count", 3, u32(2)), ("'blk.1.attn_norm.weight' is missing",)),
    "billions of layers": (of_field("llama.block_count", 3, u32(0xFFFFFFFF)), ("llama.block_count",)),
    "eps that is no number": (
        of_field("llama.attention.layer_norm_rms_epsilon", 3, b"\x00\x00\xc0\x7f"), ("layer_norm_rms_epsilon",),
    ),
    "a name twice": (of_tensor("blk.0.attn_v.weight", "name", b"blk.0.attn_k.weight"), ("blk.0.attn_k.weight",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("gguf") is None:
        pytest.skip("gguf not installed: pip install -e '.[test]'")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, CONFIG, synthetic_checkpoint(CONFIG, 3).parameters, "Q4_0")
    read_all(path)
    return path


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_gguf_file_is_one_sentence(kind: str, whole_file: Path, tmp_path: Path) -> None:
    damage, words = FILES[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(whole_file.read_bytes())
    damage(path)
    assert path.read_bytes() != whole_file.read_bytes()
    with pytest.raises(InputError) as caught:
        read_all(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(str(path))
    for word in words:
        assert word in sentence


def test_a_sum_that_no_float32_holds_is_refused(whole_file: Path, tmp_path: Path) -> None:
    """Q4_1 with scale 3 and offset 2^-24: engines round 3 * 1 + 2^-24 in different places."""
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, synthetic_checkpoint(CONFIG, 3).parameters, "Q4_1")
    read_all(path)
    of_data(GATE, np.array([3, 2.0**-24], "<f2").tobytes() + b"\x11" * 16)(path)
    with pytest.raises(InputError, match="no float32") as caught:
        read_all(path)
    assert GATE in str(caught.value)


def test_a_file_that_vanishes_is_one_sentence(whole_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole_file.read_bytes())
    weights = named_weights(load_checkpoint(path).parameters)
    path.unlink()
    with pytest.raises(InputError, match="can no longer be read"):
        weights["output"].block(0, 8)
