# SPDX-License-Identifier: Apache-2.0
"""Quantised safetensors: every weight is scale times code minus zero point, exactly, and what libraries make of it."""

from __future__ import annotations

from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.api.facts import model_facts
from refmoe.checkpoints import hf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.rows import QuantisedCheckpoint, RowWeight
from tests.checkpoints.quantised_folders import CONFIG, VARIANTS, Array, Variant, is_quantised, read_tensors, write
from tests.command_line import Refmoe

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def parameters_of(values: dict[str, Array], fused: bool) -> dict[str, Array]:
    """The parameters by their canonical names, from the tensors of a file that is not quantised."""
    found = {name: values[tensor] for name, tensor in hf.MODEL_TENSORS.items()}
    for i in range(CONFIG.layers):
        for tensor, name in hf.layer_names(CONFIG, i, "block_sparse_moe", fused):
            found[name] = values[tensor]
        if fused:
            experts = f"model.layers.{i}.block_sparse_moe.experts."
            for e in range(CONFIG.experts):
                both = values[f"{experts}gate_up_proj"][e]
                ours = f"layers.{i}.experts.{e}."
                found[ours + "w1"], found[ours + "w3"] = np.split(both, 2)
                found[ours + "w2"] = values[f"{experts}down_proj"][e]
    return found


@variants
def test_every_weight_is_scale_times_code(variant: Variant, tmp_path: Path) -> None:
    """Whole, some rows in any order, and a block of rows."""
    values = parameters_of(write(tmp_path, variant), variant.fused)
    loaded = load_checkpoint(tmp_path)
    weights = named_weights(loaded.parameters)
    assert weights.keys() == values.keys()
    quantised = 0
    for name, wanted in values.items():
        weight = weights[name]
        quantised += isinstance(weight, RowWeight)
        np.testing.assert_array_equal(np.asarray(weight.read(), np.float64), wanted, err_msg=name)
        if len(weight.shape) == 2:
            rows, some = np.array([2, 0, 0, 1]), slice(1, 3)
            np.testing.assert_array_equal(np.asarray(weight.rows(rows), np.float64), wanted[rows], err_msg=name)
            np.testing.assert_array_equal(weight.block(1, 3, np.float64), wanted[some], err_msg=name)
    left_out = 2 * len([each for each in variant.ignored])
    assert quantised == CONFIG.layers * (4 + 3 * CONFIG.experts) - left_out


@variants
def test_a_folder_tells_its_formats(variant: Variant, tmp_path: Path, refmoe: Refmoe) -> None:
    """The bits are those of all entries of the file."""
    write(tmp_path, variant)
    loaded, facts = load_checkpoint(tmp_path), model_facts(str(tmp_path))
    assert isinstance(loaded, QuantisedCheckpoint)
    assert facts["stored"] == sorted({"F32", variant.name})
    bits = 8 * sum(array.nbytes for array in read_tensors(tmp_path / "model.safetensors").values())
    assert facts["bits_per_weight"] == bits / facts["total_parameters"]
    assert "unknown_fields" not in facts
    status, out, _ = refmoe("info", tmp_path)
    assert (status, variant.name in out) == (0, True)


def test_one_weight_in_fractions(tmp_path: Path) -> None:
    """FP8 with a float32 scale takes more bits than a float32 has."""
    write(tmp_path, VARIANTS["fp8-block"])
    stored = read_tensors(tmp_path / "model.safetensors")
    module = "model.layers.1.self_attn.o_proj"
    weight = named_weights(load_checkpoint(tmp_path).parameters)["layers.1.attention.wo"].read()
    inexact = 0
    for o, i in [(0, 0), (127, 255), (63, 130), (5, 128)]:
        code, scale = stored[f"{module}.weight"][o, i], stored[f"{module}.weight_scale_inv"][o // 128, i // 128]
        exact = Fraction(float(code)) * Fraction(float(scale))
        assert Fraction(float(weight[o, i])) == exact
        inexact += Fraction(float(np.float32(weight[o, i]))) != exact
    assert inexact


# ---- libraries

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch not installed: pip install -e '.[engines]'")
needs_compressed = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors not installed: pip install -e '.[test]'"
)


def tensor_of(array: Array) -> Any:
    """A PyTorch tensor, of a dtype that NumPy has not as well."""
    torch: Any = import_module("torch")
    names = {"float8_e4m3fn": "float8_e4m3fn", "bfloat16": "bfloat16", "float8_e8m0fnu": "float8_e8m0fnu"}
    if array.dtype.name in names:
        raw = torch.from_numpy(np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").view(np.uint8).copy())
        return raw.view(getattr(torch, names[array.dtype.name])).reshape(array.shape)
    return torch.from_numpy(np.array(array))


def modules_of(folder: Path) -> dict[str, dict[str, Array]]:
    """Of each quantised module its entries."""
    found: dict[str, dict[str, Array]] = {}
    for name, array in read_tensors(folder / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        if is_quantised(f"{module}.weight"):
            found.setdefault(module, {})[part] = array
    return found


def parameter_of(module: str) -> str:
    """The canonical name of a module."""
    _, _, layer, _, *rest = module.split(".")
    return f"layers.{layer}." + (".".join(rest) if rest[0] == "experts" else f"attention.w{rest[0][0]}")


@needs_torch
@needs_compressed
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("ct-")])
def test_compressed_tensors_rounds_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Its decompression rounds the product to the dtype of the scale, and has no other difference."""
    compressors: Any = import_module("compressed_tensors.compressors")
    quantization: Any = import_module("compressed_tensors.quantization")
    variant = VARIANTS[name]
    write(tmp_path, variant)
    group = variant.config["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**group["weights"])
    )
    compressor = compressors.BaseCompressor.get_value_from_registry(variant.config["format"])
    weights = named_weights(load_checkpoint(tmp_path).parameters)
    for module, parts in modules_of(tmp_path).items():
        entries = {part: tensor_of(array) for part, array in parts.items()}
        made = compressor.decompress(entries, scheme)["weight"]
        ours = tensor_of(np.asarray(weights[parameter_of(module)].read(), np.float64)).to(made.dtype)
        assert made.dtype == entries["weight_scale"].dtype
        assert made.equal(ours), module


@needs_torch
@pytest.mark.parametrize("name", ["fp8-block-small", "fp8-block-e8m0", "fp8-block"])
def test_transformers_rounds_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Its dequantisation multiplies in float32. It takes whole blocks only."""
    fp8: Any = import_module("transformers.integrations.finegrained_fp8")
    torch: Any = import_module("torch")
    write(tmp_path, VARIANTS[name])
    high, wide = VARIANTS[name].config["weight_block_size"]
    weights, compared = named_weights(load_checkpoint(tmp_path).parameters), 0
    for module, parts in modules_of(tmp_path).items():
        codes, scales = tensor_of(parts["weight"]), tensor_of(parts["weight_scale_inv"])
        if codes.shape[0] % high or codes.shape[1] % wide:
            continue
        made = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.float32)
        ours = np.asarray(weights[parameter_of(module)].read(), np.float32)
        np.testing.assert_array_equal(ours, made.numpy(), err_msg=module)
        compared += 1
    assert compared


@needs_torch
@needs_compressed
def test_compressed_tensors_converts_awq_to_the_same_numbers(tmp_path: Path) -> None:
    """Its converter unpacks AWQ's words by a table of its own."""
    converters: Any = import_module("compressed_tensors.entrypoints.convert.converters")
    compressors: Any = import_module("compressed_tensors.compressors")
    quantization: Any = import_module("compressed_tensors.quantization")
    write(tmp_path, VARIANTS["awq"])
    weights = named_weights(load_checkpoint(tmp_path).parameters)
    arguments = quantization.QuantizationArgs(num_bits=4, group_size=32, symmetric=False)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    for module, parts in modules_of(tmp_path).items():
        entries = {f"{module}.{part}": tensor_of(array) for part, array in parts.items()}
        found = converters.AutoAWQConverter(group_size=32).process(entries)
        found = {name.removeprefix(f"{module}."): tensor for name, tensor in found.items()}
        made = compressor.decompress(found, scheme)["weight"]
        ours = tensor_of(np.asarray(weights[parameter_of(module)].read(), np.float64)).to(made.dtype)
        assert made.equal(ours), module


@pytest.mark.skipif(find_spec("auto_round_extension") is None, reason="not installed: pip install auto-round==0.16.1")
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gptq")])
def test_auto_round_unpacks_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Its layers for both versions. A float32 holds the product of a float16 scale and a code, so nothing rounds.

    With inputs in another order, its layer drops outputs where there are more of them than inputs.
    """
    torch: Any = import_module("torch")
    variant = VARIANTS[name]
    older = variant.config.get("checkpoint_format", "gptq") == "gptq"
    layers: Any = import_module(f"auto_round_extension.torch.qlinear_torch{'_zp' if older else ''}")
    write(tmp_path, variant)
    weights, compared = named_weights(load_checkpoint(tmp_path).parameters), 0
    for module, parts in modules_of(tmp_path).items():
        entries = {part: tensor_of(array) for part, array in parts.items()}
        ours = torch.from_numpy(np.asarray(weights[parameter_of(module)].read(), np.float32))
        out, width = ours.shape
        order = variant.config["desc_act"]
        if order and out > width:
            continue
        compared += 1
        layer = layers.QuantLinear(variant.config["bits"], variant.config["group_size"], width, out, False, g_idx=order)
        for part, stored in (entries | {"scales": entries["scales"].float()}).items():
            setattr(layer, part, stored)
        if not order:
            del layer.g_idx
        assert layer(torch.eye(width)).T.equal(ours), module
    assert compared >= 10
