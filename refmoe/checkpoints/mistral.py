# SPDX-License-Identifier: Apache-2.0
"""Mistral's own layout: params.json and consolidated*.safetensors, rotary rows interleaved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from refmoe.checkpoints import layout
from refmoe.checkpoints.layout import Checkpoint, ConfigurationFile, Expected, Found, whole, whole_parameter
from refmoe.checkpoints.names import expert_names
from refmoe.errors import InputError
from refmoe.files.json_file import JsonFile, read_json
from refmoe.files.reading import exists
from refmoe.files.safetensors_file import StoredTensor
from refmoe.spec.config import Config

FIELDS = {
    "dim": "dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "hidden_dim": "hidden_dim",
    "vocab": "vocab_size",
    "experts": "moe.num_experts",
    "experts_per_token": "moe.num_experts_per_tok",
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "window": "sliding_window",
    "context": "max_position_embeddings",
}
"""The spec's fields and their names in params.json."""

TIED = "tied_embeddings"
"""The field of params.json that says whether the output matrix is the embedding."""

IGNORED = ("max_seq_len", "max_position_embeddings", "max_batch_size", "model_parallel")
"""Fields that do not change the mathematics."""

LAYER_TENSORS = {
    "attention_norm": "attention_norm.weight",
    "attention.wq": "attention.wq.weight",
    "attention.wk": "attention.wk.weight",
    "attention.wv": "attention.wv.weight",
    "attention.wo": "attention.wo.weight",
    "moe_norm": "ffn_norm.weight",
    "router.gate": "feed_forward.gate.weight",
}
"""Canonical parameters of a layer and their tensors, apart from the experts'."""

MODEL_TENSORS = {"embedding": "tok_embeddings.weight", "final_norm": "norm.weight", "output": "output.weight"}
"""Canonical parameters outside the layers and their tensors."""


def half_split(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Reorder the rows of a query or key projection from pairs (2i, 2i + 1) to pairs (i, i + d/2): ROPE-3.

    rows: [heads d, D]   returns: [heads d, D], a copy
    """
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def interleaved(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """The inverse of `half_split`: rows as Mistral's own checkpoints hold them."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def read_config(path: Path) -> ConfigurationFile:
    """A params.json. Raises InputError, one sentence, for anything that does not fit."""
    file = read_json(path)
    moe = file.within("moe")
    known = {*FIELDS.values(), *IGNORED, "moe", "model_type", TIED}
    for part in (file, moe):
        for name, value in part.values.items():
            if part.prefix + name not in known and value is not None:
                raise part.refuse(name, value, "no Mixtral has this field, and ignoring it could change the result")
    if file.values.get("model_type") not in (None, "transformer"):
        raise file.refuse("model_type", file.values["model_type"], "'transformer' was expected")
    integers = ("dim", "layers", "heads", "kv_heads", "head_dim", "hidden_dim", "vocab")
    values: dict[str, Any] = {ours: file.integer(FIELDS[ours]) for ours in integers}
    values["experts"] = moe.integer("num_experts")
    values["experts_per_token"] = moe.integer("num_experts_per_tok")
    values["norm_eps"] = file.number("norm_eps")
    for ours in ("window", "context"):
        if file.values.get(FIELDS[ours]) is not None:
            values[ours] = file.integer(FIELDS[ours])
    values["rope_theta"] = _rope_theta(file, values.get("window"))
    config = layout.make_config(file, FIELDS, values)
    return ConfigurationFile(layout="mistral", path=path, config=config, fields=FIELDS, tied=file.flag(TIED))


def _rope_theta(file: JsonFile, window: Any) -> float:
    if file.values.get("rope_theta") is not None:
        return file.number("rope_theta")
    if window is not None:
        # Mistral's code first used 1e4 with a window and 1e6 without, and later always 1e6
        raise InputError(f"{file.path}: 'rope_theta' is missing, and with 'sliding_window' its default is not settled")
    return 1e6


def layer_names(config: Config, i: int) -> Iterator[tuple[str, str]]:
    """Tensor and canonical parameter, for every tensor of layer i, one by one."""
    layer = f"layers.{i}."
    for name, tensor in LAYER_TENSORS.items():
        yield layer + tensor, layer + name
    for name in expert_names(config):
        yield f"{layer}feed_forward.{name}.weight", layer + name


def expected_tensors(config: Config) -> Iterator[tuple[str, Expected]]:
    """Each tensor's name with its expectation, one by one."""

    def turned(rows: NDArray[Any]) -> NDArray[Any]:
        return half_split(rows, config.head_dim)

    for name, tensor in MODEL_TENSORS.items():
        yield tensor, whole_parameter(config, name, whole)
    for i in range(config.layers):
        for tensor, name in layer_names(config, i):
            yield tensor, whole_parameter(config, name, turned if name.endswith((".wq", ".wk")) else whole)


def weight_files(folder: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """The safetensors files of a checkpoint, in name order, and their tensors.

    Mistral's own code reads one file and uses no index. Where an index exists, the shards must agree with it.
    Raises InputError when the folder holds no such files.
    """
    index = folder / "consolidated.safetensors.index.json"
    if exists(index):
        return layout.indexed_tensors(index)
    files = sorted(folder.glob("consolidated*.safetensors"))
    if not files:
        layout.refuse_pickles(folder, ("*.pth", "*.pt"), "consolidated*.safetensors")
        raise InputError(f"{folder}: no consolidated*.safetensors is there, but one or more were expected")
    return files, layout.gather_tensors(files)


def load(folder: Path) -> Checkpoint:
    """A checkpoint in this layout. Raises InputError, one sentence, for anything that does not fit."""
    file = read_config(folder / "params.json")
    files, tensors = weight_files(folder)
    return layout.match(Found(file=file, files=files, tensors=tensors), lambda: expected_tensors(file.config))
