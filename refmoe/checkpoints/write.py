# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint that other engines load unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe import __version__
from refmoe.checkpoints import hf, mistral
from refmoe.checkpoints.names import named_weights, parameter_shapes, untied
from refmoe.checkpoints.size import total_parameters
from refmoe.checkpoints.weight import BFLOAT16, Weight
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.reading import exists
from refmoe.files.safetensors_file import open_safetensors, write_tensors
from refmoe.files.writable import make_folder, need_space
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

DTYPE_NAMES = {"bfloat16": BFLOAT16, "float16": np.dtype("float16"), "float32": np.dtype("float32")}
MARK = "written_by_refmoe"
"""The entry in the metadata of weights that refmoe has written."""
Tensors = dict[str, NDArray[Any]]


def converted(weight: Weight, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values at a dtype. Raises InputError when the dtype cannot represent one of them."""
    stored = np.asarray(weight.read())
    with np.errstate(over="ignore"):
        result = stored.astype(dtype)
    if not np.array_equal(result.astype(np.float64), stored.astype(np.float64)):
        raise InputError(f"{weight.origin} has values that {dtype} cannot hold, so it cannot be written at {dtype}")
    return result


def hf_config(config: Config, dtype: str, rope_parameters: bool = False, tied: bool = False) -> dict[str, Any]:
    """The values of a config.json: each field of the one that Mixtral 8x7B is published with, as engines need them.

    rope_parameters: write the second generation, with theta in `rope_parameters`
    tied: whether the output matrix is the embedding
    """
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in hf.FIELDS.items()}
    if rope_parameters:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    return values | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "transformers_version": "5.0.0" if rope_parameters else "4.36.0",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "use_cache": True,
    }


def mistral_params(config: Config, tied: bool = False) -> dict[str, Any]:
    """The values of a params.json.   tied: whether the output matrix is the embedding"""
    values = {theirs: getattr(config, ours) for ours, theirs in mistral.FIELDS.items() if "." not in theirs}
    if config.window is None:
        del values["sliding_window"]
    values |= {mistral.TIED: True} if tied else {}
    return values | {"moe": {"num_experts": config.experts, "num_experts_per_tok": config.experts_per_token}}


def hf_tensors(config: Config, weights: dict[str, Weight], dtype: np.dtype[Any], fused: bool) -> Iterator[Tensors]:
    """The tensors of a Hugging Face checkpoint: one dictionary for the model's own, then one per layer.

    weights: as `untied` gives them
    """

    def get(name: str) -> NDArray[Any]:
        return converted(weights[name], dtype)

    yield {tensor: get(name) for name, tensor in hf.MODEL_TENSORS.items() if name in weights}
    experts, block = range(config.experts), hf.BLOCKS[0]
    for i in range(config.layers):
        tensors = {tensor: get(name) for tensor, name in hf.layer_names(config, i, block, fused)}
        if fused:
            ours, theirs = f"layers.{i}.experts.", f"model.layers.{i}.{block}.experts."
            halves = [np.concatenate([get(f"{ours}{e}.{w}") for w in ("w1", "w3")]) for e in experts]
            tensors[f"{theirs}gate_up_proj"] = np.stack(halves)
            tensors[f"{theirs}down_proj"] = np.stack([get(f"{ours}{e}.w2") for e in experts])
        yield tensors


def mistral_tensors(config: Config, weights: dict[str, Weight], dtype: np.dtype[Any]) -> Iterator[Tensors]:
    """The tensors of a checkpoint in Mistral's layout: one dictionary for the model's own, then one per layer.

    weights: as `untied` gives them
    """

    def get(name: str) -> NDArray[Any]:
        array = converted(weights[name], dtype)
        return mistral.interleaved(array, config.head_dim) if name.endswith((".wq", ".wk")) else array

    yield {tensor: get(name) for name, tensor in mistral.MODEL_TENSORS.items() if name in weights}
    for i in range(config.layers):
        yield {tensor: get(name) for tensor, name in mistral.layer_names(config, i)}


def write_checkpoint(
    folder: Path, config: Config, parameters: Parameters, dtype: str = "bfloat16", layout: str = "hf",
    *, fused: bool = False, rope_parameters: bool = False, shards: bool = False,
) -> None:  # fmt: skip
    """Write a checkpoint. The configuration is written last, so that a folder with a configuration is complete.

    dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.   layout: ``"hf"`` or ``"mistral"``.
    fused, rope_parameters: variants of the Hugging Face layout.   shards: one file per layer, with an index.
    Raises InputError when a value is not representable at `dtype`, the folder cannot be written, or it holds
    weights that this checkpoint would not replace.
    """
    weights = named_weights(parameters)
    if weights.keys() != parameter_shapes(config).keys():
        raise ValueError("parameters and config disagree")
    with new_folder(folder):
        stored = untied(weights)
        _write(folder, config, stored, dtype, layout, fused=fused, rope_parameters=rope_parameters, shards=shards)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it. If the body raises, those of them that are empty are removed again."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder, parents=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for each in made:
                each.rmdir()
        raise


def _write(
    folder: Path, config: Config, weights: dict[str, Weight], dtype: str, layout: str, *, fused: bool,
    rope_parameters: bool, shards: bool,
) -> None:  # fmt: skip
    """Write the files of a checkpoint into a folder."""
    wanted, tied = DTYPE_NAMES[dtype], "output" not in weights
    if layout == "hf":
        configuration, stem = folder / "config.json", "model"
        parts, values = hf_tensors(config, weights, wanted, fused), hf_config(config, dtype, rope_parameters, tied)
    else:
        configuration, stem = folder / "params.json", "consolidated"
        parts, values = mistral_tensors(config, weights, wanted), mistral_params(config, tied)
    pieces = config.layers + 1 if shards else 1
    files = shard_names(stem, pieces)
    strangers = {path.name for path in folder.glob(f"{stem}*.safetensors*")} - set(files)
    if strangers - ({f"{stem}.safetensors.index.json"} if shards else set()):
        raise InputError(f"{folder}: holds {min(strangers)} of another checkpoint, but a folder without was expected")
    refuse_others(folder, configuration, [folder / name for name in files])
    need_space(folder / files[0], total_parameters(config, tied) * wanted.itemsize)
    configuration.unlink(missing_ok=True)
    if shards:
        _write_shards(folder, stem, files, parts)
    else:
        write_shard(folder / files[0], {name: tensor for part in parts for name, tensor in part.items()})
    write_json(configuration, values)


def refuse_others(folder: Path, configuration: Path, files: Sequence[Path]) -> None:
    """Raises InputError when the folder holds files of these names that refmoe has not written.

    Weights of a formula can be written again, and those of anybody else cannot.
    """
    if (folder / "case.toml").exists():
        raise InputError(f"{folder}: is the folder of a golden case, but a folder of its own was expected")
    there = [path for path in files if exists(path)]
    for path in there:
        if MARK not in open_safetensors(path)[1]:
            raise InputError(f"{path}: are weights that refmoe has not written, but a folder without was expected")
    if exists(configuration) and not there:
        raise InputError(f"{configuration}: is the configuration of another model, but a folder without was expected")


def shard_names(stem: str, pieces: int) -> list[str]:
    """The names of a checkpoint's safetensors files."""
    if pieces == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{pieces:05d}.safetensors" for number in range(1, pieces + 1)]


def _write_shards(folder: Path, stem: str, files: list[str], parts: Iterable[Tensors]) -> None:
    weight_map: dict[str, str] = {}
    size = 0
    for file, tensors in zip(files, parts, strict=True):
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file with refmoe's mark."""
    arrays = {name: partial(np.asarray, tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        write_tensors(temporary, arrays, {"format": "pt", MARK: __version__})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object, as the files beside weights are."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
