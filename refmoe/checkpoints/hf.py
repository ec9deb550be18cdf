# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face layout: config.json and model.safetensors, whole or in shards, experts apart or fused."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from refmoe.checkpoints import layout
from refmoe.checkpoints.foreign_fields import refuse_foreign, unknown_fields
from refmoe.checkpoints.layout import Checkpoint, ConfigurationFile, Expected, Found, whole, whole_parameter
from refmoe.checkpoints.names import expert_names
from refmoe.checkpoints.quantisation import FIELD as QUANTISATION
from refmoe.checkpoints.quantisation import assembled, read_quantisation, refuse_cache_scales
from refmoe.checkpoints.rows import match_rows
from refmoe.errors import InputError
from refmoe.files.json_file import JsonFile, read_json
from refmoe.files.reading import exists
from refmoe.files.safetensors_file import StoredTensor, View
from refmoe.files.sentences import quoted
from refmoe.spec.config import Config

FIELDS = {
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab": "vocab_size",
    "experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "window": "sliding_window",
    "context": "max_position_embeddings",
}
"""The spec's fields and their names in config.json."""

TIED = "tie_word_embeddings"
"""The field of config.json that says whether the output matrix is the embedding."""

NOT_PLAIN = ("head_dim", "window", "norm_eps", "rope_theta")
"""The spec's fields that are no integers or may be absent from config.json."""

LAYER_TENSORS = {
    "attention_norm": "input_layernorm.weight",
    "attention.wq": "self_attn.q_proj.weight",
    "attention.wk": "self_attn.k_proj.weight",
    "attention.wv": "self_attn.v_proj.weight",
    "attention.wo": "self_attn.o_proj.weight",
    "moe_norm": "post_attention_layernorm.weight",
}
"""Canonical parameters of a layer and their tensors, apart from those of the mixture of experts."""

MODEL_TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
"""Canonical parameters outside the layers and their tensors."""

BLOCKS = ("block_sparse_moe", "mlp")
"""Names of the module of the mixture of experts: in checkpoints, and in the model class of transformers 5."""


def read_config(path: Path) -> ConfigurationFile:
    """A config.json.

    Both generations are read: `rope_theta` at the top level, and `rope_parameters.rope_theta`. Raises InputError for
    fields that would change the mathematics: another rope type or activation, biases.
    """
    file = read_json(path)
    for name, value in {"model_type": "mixtral", "hidden_act": "silu"}.items():
        if file.need(name) != value:
            raise file.refuse(name, file.values[name], f"'{value}' was expected: this is not a Mixtral")
    integers = {ours: theirs for ours, theirs in FIELDS.items() if ours not in NOT_PLAIN}
    values = {ours: file.integer(theirs) for ours, theirs in integers.items()}
    window = None if file.values.get("sliding_window") is None else file.integer("sliding_window")
    head_dim, theta = _head_dim(file, values["dim"], values["heads"]), _rope_theta(file)
    rest = {"head_dim": head_dim, "window": window, "norm_eps": file.number("rms_norm_eps"), "rope_theta": theta}
    config = layout.make_config(file, FIELDS, values | rest)
    refuse_foreign(file, config)
    read_quantisation(file)
    return ConfigurationFile(
        layout="hf", path=path, config=config, fields=FIELDS, tied=file.flag(TIED),
        unknown=unknown_fields(file, frozenset((*FIELDS.values(), TIED, QUANTISATION))),
    )  # fmt: skip


def _head_dim(file: JsonFile, dim: int, heads: int) -> int:
    if file.values.get("head_dim") is not None:
        return file.integer("head_dim")
    if heads < 1 or dim % heads:
        raise InputError(
            f"{file.path}: 'head_dim' is missing and cannot be derived: hidden_size = {dim} is not a multiple of "
            f"num_attention_heads = {heads}"
        )
    return dim // heads


def _rope_theta(file: JsonFile) -> float:
    found = {}
    if file.values.get("rope_theta") is not None:
        found["rope_theta"] = file.number("rope_theta")
    if file.values.get("rope_parameters") is not None:
        parameters = file.within("rope_parameters")
        if parameters.values.get("rope_type", "default") != "default":
            raise parameters.refuse("rope_type", parameters.values["rope_type"], "'default' was expected")
        for name, value in parameters.values.items():
            whole = name == "partial_rotary_factor" and value == 1 and not isinstance(value, bool)
            if name not in ("rope_type", "rope_theta") and value is not None and not whole:
                raise parameters.refuse(name, value, "Mixtral's rotary embedding has no such parameter")
        if not found or parameters.values.get("rope_theta") is not None:
            found["rope_parameters.rope_theta"] = parameters.number("rope_theta")
    if not found:
        raise InputError(f"{file.path}: neither 'rope_theta' nor 'rope_parameters.rope_theta' is there")
    if len(set(found.values())) > 1:
        pairs = " but ".join(f"{quoted(name)} is {value}" for name, value in found.items())
        raise InputError(f"{file.path}: {pairs}, and the same was expected of both")
    return next(iter(found.values()))


def layer_names(config: Config, i: int, block: str, fused: bool) -> Iterator[tuple[str, str]]:
    """Tensor and canonical parameter, for layer i and every tensor that is one parameter, one by one."""
    ours, theirs = f"layers.{i}.", f"model.layers.{i}."
    for name, tensor in LAYER_TENSORS.items():
        yield theirs + tensor, ours + name
    yield f"{theirs}{block}.gate.weight", ours + "router.gate"
    for name in () if fused else expert_names(config):
        yield f"{theirs}{block}.{name}.weight", ours + name


def expected_tensors(config: Config, block: str, fused: bool) -> Iterator[tuple[str, Expected]]:
    """Each tensor's name with its expectation, one by one.

    block: the name of the module of the mixture of experts.
    fused: experts as `gate_up_proj` [E, 2F, D] (the gate first) and `down_proj` [E, D, F], or apart as `w1`, `w2`, `w3`
    """
    fields = ("experts", "hidden_dim", "dim")
    dim, hidden, experts = config.dim, config.hidden_dim, config.experts
    for name, tensor in MODEL_TENSORS.items():
        yield tensor, whole_parameter(config, name, whole)
    for i in range(config.layers):
        for tensor, name in layer_names(config, i, block, fused):
            yield tensor, whole_parameter(config, name, whole)
        if fused:
            ours, theirs = f"layers.{i}.experts.", f"model.layers.{i}.{block}.experts."
            halves = ((f"{ours}{e}.{w}", cut) for e in range(experts) for w, cut in _halves(e, hidden))
            yield f"{theirs}gate_up_proj", Expected((experts, 2 * hidden, dim), fields, halves)
            down = ((f"{ours}{e}.w2", itemgetter(e)) for e in range(experts))
            yield f"{theirs}down_proj", Expected((experts, dim, hidden), fields, down)


def _halves(expert: int, hidden: int) -> tuple[tuple[str, View], tuple[str, View]]:
    return ("w1", lambda stored: stored[expert, :hidden]), ("w3", lambda stored: stored[expert, hidden:])


def weight_files(folder: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """The safetensors files of a checkpoint, in name order, and their tensors.

    Raises InputError when the folder holds no such files, or a single file beside an index that names others.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if exists(single) and exists(index):
        other = [path for path in layout.shards_of(index)[0] if path != single]
        if other:
            raise InputError(
                f"{folder}: holds {single.name} beside {index.name}, which names {quoted(other[0].name)}, but one of "
                "the two was expected"
            )
        return layout.indexed_tensors(index)
    if exists(single):
        return [single], layout.gather_tensors([single])
    if exists(index):
        return layout.indexed_tensors(index)
    layout.refuse_pickles(folder, ("*.bin", "*.pt", "*.pth"), "safetensors")
    raise InputError(f"{folder}: neither {single.name} nor {index.name} is there, but one of them was expected")


def load(folder: Path) -> Checkpoint:
    """A checkpoint in this layout. Raises InputError, one sentence, for anything that does not fit."""
    file = read_config(folder / "config.json")
    files, tensors = weight_files(folder)
    refuse_cache_scales(tensors)
    quantisation = read_quantisation(read_json(file.path))
    tensors = tensors if quantisation is None else assembled(tensors, quantisation)
    block = next((b for b in reversed(BLOCKS) if any(f".{b}." in name for name in tensors)), BLOCKS[0])
    fused = any(name.endswith(".experts.gate_up_proj") for name in tensors)
    found = Found(file=file, files=files, tensors=tensors)
    matched = layout.match if quantisation is None else match_rows
    return matched(found, lambda: expected_tensors(file.config, block, fused))
