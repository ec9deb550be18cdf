# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints that refmoe writes: near the model that they come from, and loaded by transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refmoe as api
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.quantisation import FIELD
from refmoe.checkpoints.quantise import ATTENTION, NAMES, RECIPES
from refmoe.checkpoints.rows import RowWeight
from tests.checkpoints.quantised_folders import read_tensors
from tests.command_line import Refmoe

CASE = "production-sequences"
recipes = pytest.mark.parametrize("recipe", RECIPES)
missing = [name for name in ("torch", "transformers", "accelerate", "compressed_tensors") if find_spec(name) is None]
needs_transformers = pytest.mark.skipif(
    bool(missing), reason=f"not installed: {missing}; pip install -e '.[engines,test]'"
)


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    model = api.case(CASE).model
    return {name: np.asarray(weight.read(), np.float64) for name, weight in named_weights(model.parameters).items()}


@recipes
def test_each_weight_is_within_half_a_step(
    recipe: str, tmp_path: Path, refmoe: Refmoe, original: dict[str, Any]
) -> None:
    """Half a step of four bits is 1/15 of the largest of its group; floats of eight bits are within 1/16 of each."""
    said = refmoe("materialise", CASE, tmp_path / "m", "--quantise", recipe, "--dtype", "float32")
    assert said[0] == 0, said
    quantised = 0
    for name, weight in named_weights(load_checkpoint(tmp_path / "m").parameters).items():
        found, wanted = np.asarray(weight.read(), np.float64), original[name]
        if isinstance(weight, RowWeight):
            quantised += 1
            size = np.abs(wanted) if recipe.startswith("fp8") else np.abs(wanted).max(axis=-1, keepdims=True)
            smallest = np.abs(wanted).max() * 2.0**-16
            assert (np.abs(found - wanted) <= size / 14 + smallest).all(), name
        else:
            np.testing.assert_array_equal(found, wanted, err_msg=name)
    assert quantised >= 2 * (2 + 3 * 8)


def parameters_of(model: Any, layer: int, hidden: int) -> Iterator[tuple[str, Any]]:
    """The quantised matrices of a transformers model, by their canonical names."""
    block = model.model.layers[layer]
    for name in "qkvo":
        yield f"layers.{layer}.attention.w{name}", getattr(block.self_attn, f"{name}_proj").weight
    for e, (both, down) in enumerate(zip(block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj, strict=True)):
        yield f"layers.{layer}.experts.{e}.w1", both[:hidden]
        yield f"layers.{layer}.experts.{e}.w3", both[hidden:]
        yield f"layers.{layer}.experts.{e}.w2", down


@pytest.mark.parametrize("recipe", [name for name in NAMES if name.endswith(ATTENTION)])
def test_attention_alone_is_quantised(recipe: str, tmp_path: Path, refmoe: Refmoe, original: dict[str, Any]) -> None:
    assert refmoe("materialise", CASE, tmp_path / "m", "--quantise", recipe, "--dtype", "float32")[0] == 0
    assert refmoe("materialise", CASE, tmp_path / "w", "--quantise", recipe.removesuffix(ATTENTION))[0] == 0
    whole = named_weights(load_checkpoint(tmp_path / "w").parameters)
    for name, weight in named_weights(load_checkpoint(tmp_path / "m").parameters).items():
        assert isinstance(weight, RowWeight) == (".attention.w" in name and isinstance(whole[name], RowWeight)), name
        expected = whole[name].read() if isinstance(weight, RowWeight) else original[name]
        np.testing.assert_array_equal(weight.read(), expected, err_msg=name)


@needs_transformers
def test_int8_is_read_by_the_library_of_its_format(tmp_path: Path, refmoe: Refmoe) -> None:
    """compressed-tensors gives the same numbers, rounded to float32. transformers loads no experts of this kind."""
    torch, compressors = import_module("torch"), import_module("compressed_tensors.compressors")
    load_file = import_module("safetensors.torch").load_file
    config_of, transformers = import_module("compressed_tensors.quantization"), import_module("transformers")
    assert refmoe("materialise", CASE, tmp_path / "m", "--quantise", "int8-channel", "--dtype", "float32")[0] == 0
    declared = json.loads((tmp_path / "m" / "config.json").read_text())[FIELD]
    scheme = config_of.QuantizationConfig.model_validate(declared).config_groups["group_0"]
    compressor = compressors.BaseCompressor.get_value_from_registry(declared["format"])
    stored = load_file(tmp_path / "m" / "model.safetensors")
    weights = named_weights(load_checkpoint(tmp_path / "m").parameters)
    matrices = {"attention.wq": "self_attn.q_proj", "experts.5.w2": "block_sparse_moe.experts.5.w2"}
    for ours, theirs in matrices.items():
        parts = {part: stored[f"model.layers.1.{theirs}.{part}"] for part in ("weight", "weight_scale")}
        assert parts["weight"].dtype == torch.int8
        values = torch.from_numpy(np.asarray(weights[f"layers.1.{ours}"].read(), np.float64)).float()
        assert compressor.decompress(parts, scheme)["weight"].equal(values), ours
    with pytest.raises(RuntimeError, match="conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "int8-channel"])
@needs_transformers
def test_transformers_loads_the_same_numbers(
    recipe: str, tmp_path: Path, refmoe: Refmoe, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounded to the dtype in which it holds them: float32, or that of the scales. Its logits are near the model's."""
    torch, transformers = import_module("torch"), import_module("transformers")
    assert refmoe("materialise", CASE, tmp_path / "m", "--quantise", recipe, "--dtype", "float32")[0] == 0
    with caplog.at_level(logging.ERROR):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokens = [1, 5, 9, 33]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    ours = api.load(tmp_path / "m")
    weights = named_weights(ours.parameters)
    for layer in range(ours.config.layers):
        for name, made in parameters_of(model, layer, ours.config.hidden_dim):
            values = torch.from_numpy(np.asarray(weights[name].read(), np.float64))
            assert made.equal(values.to(made.dtype)), name
    exact = ours.run(tokens, dtype="float64")["prefill", "logits"]
    assert np.linalg.norm(logits - exact) < 0.1 * np.linalg.norm(exact)


def test_what_cannot_be_quantised_is_one_sentence(tmp_path: Path, refmoe: Refmoe) -> None:
    """Matrices of other sizes, Mistral's layout, and a folder with weights of somebody else."""
    status, _, err = refmoe("materialise", "one-pair", tmp_path / "m", "--quantise", "fp8-block128")
    assert (status, "128 rows" in err) == (2, True)
    assert not (tmp_path / "m").exists()
    assert refmoe("materialise", CASE, tmp_path / "m", "--quantise", "fp8-channel", "--layout", "mistral")[0] == 2
    assert refmoe("materialise", CASE, tmp_path / "m", "--quantise", "fp8-channel")[0] == 0
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"written_by_refmoe", b"written_by_others"))
    before = path.read_bytes()
    assert refmoe("materialise", CASE, tmp_path / "m", "--quantise", "int4-group32")[0] == 2
    assert path.read_bytes() == before
    assert read_tensors(path)
