# SPDX-License-Identifier: Apache-2.0
"""GGUF files: write a checkpoint the way llama.cpp's own converter writes a Mixtral."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe import __version__
from refmoe.checkpoints.ggml_blocks import FORMATS
from refmoe.checkpoints.ggml_quantise import KINDS, format_of, quantised
from refmoe.checkpoints.mistral import interleaved
from refmoe.checkpoints.names import named_weights, untied
from refmoe.checkpoints.weight import Weight
from refmoe.checkpoints.write import MARK, converted, new_folder
from refmoe.errors import InputError, require
from refmoe.files.atomic import replacing
from refmoe.files.gguf_tensors import open_gguf
from refmoe.files.reading import exists
from refmoe.files.safetensors_file import DTYPES
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
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtype of a tensor, and ggml's name of its type."""
FILE_TYPES_OF_FORMATS = {"Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "MXFP4": "MXFP4_MOE"}
"""Files in one format whose name in gguf is another than the format's."""
NO_MERGE = "\u0120 \u0120"
"""A merge of two blanks, which the words of `words` never have."""


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a GGUF file."""

    model: str
    """gguf's name of the tokenizer: ``llama`` or ``gpt2``."""
    pieces: list[str]
    """The piece of each token."""
    kinds: list[str]
    """gguf's name of the kind of each piece."""
    begin: int
    end: int
    """The tokens that begin and end a text."""
    merges: tuple[str, ...] = ()
    """The merges of a ``gpt2`` tokenizer, which refuses a file without any."""
    scores: tuple[float, ...] = ()
    """The score of each piece of a ``llama`` tokenizer; none: all are 0."""
    cut: str = "default"
    """gguf's name of the way in which a ``gpt2`` tokenizer cuts a text."""
    adds_begin: bool = False
    """Whether a text begins with the token `begin`."""


def placeholders(vocab: int) -> Vocabulary:
    """The vocabulary of a model that only knows token ids.

    It has as many pieces as there are rows: Mixtral's unknown token, control tokens and bytes, then unused pieces.
    """
    first = [("<unk>", "UNKNOWN"), ("<s>", "CONTROL"), ("</s>", "CONTROL")]
    first += [(f"<0x{byte:02X}>", "BYTE") for byte in range(256)]
    rest = [(f"<unused{token}>", "UNUSED") for token in range(len(first), vocab)]
    pieces, kinds = zip(*(first + rest)[:vocab], strict=True)
    return Vocabulary("llama", list(pieces), list(kinds), begin=min(1, vocab - 1), end=min(2, vocab - 1))


def words(pieces: Sequence[str]) -> Vocabulary:
    """The vocabulary of a model whose tokens are these words, in a text without anything between them.

    llama.cpp takes the longest user-defined pieces of a text before it applies merges. The last word ends a text.
    """
    end = len(pieces) - 1
    kinds = ["USER_DEFINED"] * len(pieces)
    return Vocabulary("gpt2", list(pieces), kinds, begin=end, end=end, merges=(NO_MERGE,))


def type_of(config: Config, weight: Weight, name: str, kind: str) -> str:
    """ggml's name of the type that a parameter is written in.   kind: as `write_gguf` takes it"""
    if len(weight.shape) == 1 or name.endswith("router.gate"):
        return "F32"
    return TYPES[kind] if kind in TYPES else format_of(kind, config, name, weight.shape[1])


Typed = tuple[str, NDArray[Any], str]
"""The name of a tensor, its array or its bytes, and ggml's name of its type."""


def tensors(config: Config, weights: dict[str, Weight], kind: str = "float32") -> Iterator[Typed]:
    """Every tensor. Raises InputError for a value that its dtype cannot hold.

    weights: as `untied` gives them; llama.cpp takes the embedding where there is no output matrix
    kind: of the matrices, one of `FILE_TYPES` or `KINDS`; that of the router is float32 all the same, as are the gains.
    Matrices are [out, in] as in the checkpoint, and [E, out, in] for experts. llama.cpp rotates the pairs (2i, 2i + 1)
    of a llama's queries and keys, so their rows are interleaved: ROPE-3.
    """

    def get(name: str, wanted: str) -> NDArray[Any]:
        array = converted(weights[name], np.dtype(DTYPES[wanted if wanted not in FORMATS else "F32"]))
        return interleaved(array, config.head_dim) if name.endswith((".wq", ".wk")) else array

    def typed(tensor: str, names: Sequence[str], fused: bool = False) -> Typed:
        wanted = type_of(config, weights[names[0]], names[0], kind)
        array = np.stack([get(name, wanted) for name in names]) if fused else get(names[0], wanted)
        return f"{tensor}.weight", quantised(array, wanted) if wanted in FORMATS else array, wanted

    for name, tensor in MODEL_TENSORS.items():
        if name in weights:
            yield typed(tensor, [name])
    for i in range(config.layers):
        for name, tensor in LAYER_TENSORS.items():
            yield typed(f"blk.{i}.{tensor}", [f"layers.{i}.{name}"])
        for name, tensor in EXPERT_TENSORS.items():
            experts = [f"layers.{i}.experts.{e}.{name}" for e in range(config.experts)]
            yield typed(f"blk.{i}.{tensor}", experts, fused=True)


def file_type(kind: str) -> str:
    """gguf's name of a file whose matrices have this dtype or format."""
    return FILE_TYPES.get(kind, f"MOSTLY_{FILE_TYPES_OF_FORMATS.get(kind, kind)}")


def write_gguf(
    path: Path, config: Config, parameters: Parameters, kind: str = "float32", vocabulary: Vocabulary | None = None
) -> None:
    """Write a GGUF file. Engines refuse a file without a vocabulary.

    kind: one of `FILE_TYPES` or `KINDS`, the dtype or the format of matrices   vocabulary: None: `placeholders`
    A window is not written, as llama.cpp's llama has none. Raises InputError when the package gguf is not installed, or
    a dtype cannot represent a value.
    """
    gguf: Any = require("gguf", "llama-cpp", "writing a GGUF file")
    weights = untied(named_weights(parameters))
    if kind in KINDS and not any(type_of(config, weights[name], name, kind) in FORMATS for name in weights):
        raise InputError(f"no matrix has rows of whole blocks of 32, so a dtype was expected instead of {kind}")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(MARK, __version__)
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
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type(kind)))
    writer.add_vocab_size(config.vocab)
    text = placeholders(config.vocab) if vocabulary is None else vocabulary
    writer.add_tokenizer_model(text.model)
    writer.add_tokenizer_pre(text.cut)
    writer.add_token_list(text.pieces)
    writer.add_token_scores(text.scores or [0.0] * config.vocab)
    writer.add_token_types([getattr(gguf.TokenType, each) for each in text.kinds])
    if text.merges:
        writer.add_token_merges(text.merges)
    writer.add_bos_token_id(text.begin)
    writer.add_eos_token_id(text.end)
    if vocabulary is not None:
        writer.add_add_bos_token(vocabulary.adds_begin)
        writer.add_add_eos_token(False)
    for name, array, wanted in tensors(config, weights, kind):
        # NumPy has neither blocks nor bfloat16 of its own: gguf takes their bytes
        raw = array if wanted in ("F32", "F16") else array.view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[wanted])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf_model(folder: Path, config: Config, parameters: Parameters, kind: str) -> Path:
    """Write a folder with one GGUF file, and return the file.   kind: as `write_gguf` takes it

    Raises InputError as `write_gguf` does, and when the folder cannot be written or holds a model of somebody else.
    """
    path = folder / "model.gguf"
    with new_folder(folder):
        if (folder / "case.toml").exists():
            raise InputError(f"{folder}: is the folder of a golden case, but a folder of its own was expected")
        if exists(path) and MARK not in open_gguf(path).values:
            raise InputError(f"{path}: is a model that refmoe has not written, but a folder without was expected")
        with replacing(path) as temporary:
            write_gguf(temporary, config, parameters, kind)
    return path
