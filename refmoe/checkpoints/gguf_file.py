# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint as a GGUF file, the way llama.cpp's own converter writes a Mixtral."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.formats import FORMATS
from refmoe.checkpoints.mistral import interleaved
from refmoe.checkpoints.weight import BFLOAT16, Weight
from refmoe.checkpoints.write import converted, named_weights
from refmoe.errors import require
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


def tensors(config: Config, weights: dict[str, Weight], dtype: str = "float32") -> Iterator[tuple[str, NDArray[Any]]]:
    """Every tensor by name. Raises InputError for a value that its dtype cannot hold.

    dtype: of the matrices; that of the router is float32 all the same, as are the gains.
    Matrices are [out, in] as in the checkpoint, and [E, out, in] for experts. llama.cpp rotates the pairs (2i, 2i + 1)
    of a llama's queries and keys, so their rows are interleaved: ROPE-3.
    """

    def get(name: str) -> NDArray[Any]:
        matrix = len(weights[name].shape) > 1 and not name.endswith("router.gate")
        array = converted(weights[name], FORMATS[dtype].dtype if matrix else np.dtype(np.float32))
        return interleaved(array, config.head_dim) if name.endswith((".wq", ".wk")) else array

    for name, tensor in MODEL_TENSORS.items():
        yield f"{tensor}.weight", get(name)
    for i in range(config.layers):
        for name, tensor in LAYER_TENSORS.items():
            yield f"blk.{i}.{tensor}.weight", get(f"layers.{i}.{name}")
        for name, tensor in EXPERT_TENSORS.items():
            experts = [get(f"layers.{i}.experts.{e}.{name}") for e in range(config.experts)]
            yield f"blk.{i}.{tensor}.weight", np.stack(experts)


def write_gguf(path: Path, config: Config, parameters: Parameters, dtype: str = "float32") -> None:
    """Write a GGUF file without a tokenizer; it only has the number of tokens.

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
    writer.add_tokenizer_model("no_vocab")
    for name, array in tensors(config, named_weights(parameters), dtype):
        if array.dtype == BFLOAT16:  # NumPy has no such dtype of its own: gguf takes the bytes
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
