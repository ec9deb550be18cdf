# SPDX-License-Identifier: Apache-2.0
"""GGUF files: write a checkpoint the way llama.cpp's own converter writes a Mixtral, and read a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.formats import FORMATS
from refmoe.checkpoints.layout import ConfigurationFile, make_config
from refmoe.checkpoints.mistral import interleaved
from refmoe.checkpoints.weight import BFLOAT16, Weight
from refmoe.checkpoints.write import converted, named_weights, untied
from refmoe.errors import require
from refmoe.files.foreign import GGUF, foreign_parser, other_format
from refmoe.files.json_file import JsonFile
from refmoe.files.reading import exists, is_folder
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

ARCHITECTURE = "llama"
"""llama.cpp has no architecture of its own for Mixtral: it is a llama with experts."""

MODEL_TENSORS = {"embedding": "token_embd", "final_norm": "output_norm", "output": "output"}
"""Canonical parameters outside the layers and their tensors, each with suffix ``.weight``."""

LAYER_TENSORS = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "moe_norm": "ffn_norm",
    "router.gate": "ffn_gate_inp",
}
"""Canonical parameters of a layer and their tensors, each ``blk.{i}.<name>.weight``."""

EXPERT_TENSORS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
"""An expert's matrices and their tensors. One tensor holds the matrices of all experts of a layer, expert 0 first."""


FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
"""The dtype of matrices, and gguf's name of a file that has it. Gains and the router's matrix are float32 in each."""


def placeholders(vocab: int) -> tuple[list[str], list[str]]:
    """The pieces of a vocabulary, and gguf's names of their kinds, for a model that only knows token ids.

    As many as there are rows: Mixtral's unknown token, control tokens and bytes, and unused pieces after them.
    """
    first = [("<unk>", "UNKNOWN"), ("<s>", "CONTROL"), ("</s>", "CONTROL")]
    first += [(f"<0x{byte:02X}>", "BYTE") for byte in range(256)]
    rest = [(f"<unused{token}>", "UNUSED") for token in range(len(first), vocab)]
    pieces, kinds = zip(*(first + rest)[:vocab], strict=True)
    return list(pieces), list(kinds)


def tensors(config: Config, weights: dict[str, Weight], dtype: str = "float32") -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor by name. Raises InputError for a value that its dtype cannot hold.

    weights: as `untied` gives them; llama.cpp takes the embedding where there is no output matrix
    dtype: of the matrices; that of the router is float32 all the same, as are the gains.
    Matrices are [out, in] as in the checkpoint, and [E, out, in] for experts. llama.cpp rotates the pairs (2i, 2i + 1)
    of a llama's queries and keys, so their rows are interleaved: ROPE-3.
    """

    def get(name: str) -> NDArray[Any]:
        matrix = len(weights[name].shape) > 1 and not name.endswith("router.gate")
        array = converted(weights[name], FORMATS[dtype].dtype if matrix else np.dtype(np.float32))
        return interleaved(array, config.head_dim) if name.endswith((".wq", ".wk")) else array

    for name, tensor in MODEL_TENSORS.items():
        if name in weights:
            yield f"{tensor}.weight", get(name)
    for i in range(config.layers):
        for name, tensor in LAYER_TENSORS.items():
            yield f"blk.{i}.{tensor}.weight", get(f"layers.{i}.{name}")
        for name, tensor in EXPERT_TENSORS.items():
            experts = [get(f"layers.{i}.experts.{e}.{name}") for e in range(config.experts)]
            yield f"blk.{i}.{tensor}.weight", np.stack(experts)


FIELDS = {
    "dim": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "vocab": "vocab_size",
    "experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "context": "context_length",
}
"""The spec's fields and their names in the metadata, each with prefix ``llama.``."""


def is_gguf(path: Path) -> bool:
    """Whether this is a file that begins as GGUF files do. Raises InputError when it cannot be read."""
    return exists(path) and not is_folder(path) and other_format(path) == GGUF


def read_gguf(path: Path) -> tuple[ConfigurationFile, tuple[str, ...]]:
    """The configuration of a Mixtral in a GGUF file, and the types that its tensors are stored in.

    Fields that older converters left out have llama.cpp's defaults.
    Raises InputError when the package gguf is not installed, or the file holds no Mixtral.
    """
    gguf: Any = require("gguf", "llama-cpp", "reading a GGUF file")
    with foreign_parser(path, "a GGUF file"):
        reader = gguf.GGUFReader(path)
        prefix = f"{ARCHITECTURE}."
        scalar = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        values = {name: field.contents() for name, field in scalar.items()}
        shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
        kinds = tuple(sorted({tensor.tensor_type.name for tensor in reader.tensors}))
    whole = JsonFile(path, values)
    if whole.need("general.architecture") != ARCHITECTURE:
        raise whole.refuse("general.architecture", values["general.architecture"], f"'{ARCHITECTURE}' was expected")
    file = JsonFile(path, {name.removeprefix(prefix): value for name, value in values.items()}, prefix)
    if file.values.get("rope.scaling.type") not in (None, "none"):
        raise file.refuse("rope.scaling.type", file.values["rope.scaling.type"], "'none' was expected")
    if "token_embd.weight" in shapes:
        file.values.setdefault(FIELDS["vocab"], shapes["token_embd.weight"][-1])
    file.values.setdefault(FIELDS["kv_heads"], file.integer(FIELDS["heads"]))
    file.values.setdefault(FIELDS["head_dim"], file.integer(FIELDS["dim"]) // max(1, file.integer(FIELDS["heads"])))
    file.values.setdefault(FIELDS["rope_theta"], 1e4)
    real = ("norm_eps", "rope_theta")
    found = {ours: (file.number if ours in real else file.integer)(theirs) for ours, theirs in FIELDS.items()}
    names = {ours: prefix + theirs for ours, theirs in FIELDS.items()}
    config = make_config(file, names, found)
    tied = bool(shapes) and "output.weight" not in shapes
    return ConfigurationFile(layout="gguf", path=path, config=config, fields=names, tied=tied), kinds


def write_gguf(path: Path, config: Config, parameters: Parameters, dtype: str = "float32") -> None:
    """Write a GGUF file, with the pieces of `placeholders` for a tokenizer: engines refuse a file that has none.

    dtype: one of `FILE_TYPES`, the dtype of matrices
    A window is not written, as llama.cpp's llama has none. Raises InputError when the package gguf is not installed, or
    a dtype cannot represent a value.
    """
    gguf: Any = require("gguf", "llama-cpp", "writing a GGUF file")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[dtype]))
    writer.add_vocab_size(config.vocab)
    pieces, kinds = placeholders(config.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * config.vocab)
    writer.add_token_types([getattr(gguf.TokenType, kind) for kind in kinds])
    writer.add_bos_token_id(min(1, config.vocab - 1))
    writer.add_eos_token_id(min(2, config.vocab - 1))
    for name, array in tensors(config, untied(named_weights(parameters)), dtype):
        if array.dtype == BFLOAT16:  # NumPy has no such dtype of its own: gguf takes the bytes
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
