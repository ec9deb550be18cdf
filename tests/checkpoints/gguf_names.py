# SPDX-License-Identifier: Apache-2.0
"""The parameters of a Mixtral from the tensors of a GGUF file, by the names and orders that llama.cpp gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.spec.config import Config


def unpermuted(rows: NDArray[Any], head: int) -> NDArray[Any]:
    """Rows (2i, 2i + 1) of each head back at (i, i + d/2): the inverse of llama.cpp's `permute`.   head: d"""
    order = [start + turn for start in range(0, len(rows), head) for turn in (*range(0, head, 2), *range(1, head, 2))]
    return rows[order]


def canonical(of_file: Mapping[str, NDArray[np.float32]], config: Config) -> dict[str, NDArray[np.float32]]:
    """Every parameter by its canonical name.   of_file: values by the names of tensors, which end in ``.weight``"""
    found = {"embedding": "token_embd", "final_norm": "output_norm", "output": "output"}
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"blk.{i}."
        found |= {ours + "attention_norm": theirs + "attn_norm", ours + "moe_norm": theirs + "ffn_norm"}
        found |= {ours + "router.gate": theirs + "ffn_gate_inp", ours + "attention.wo": theirs + "attn_output"}
        found |= {f"{ours}attention.w{x}": f"{theirs}attn_{x}" for x in "qkv"}
    values = {ours: of_file[f"{theirs}.weight"] for ours, theirs in found.items()}
    for name in values:
        if name.endswith((".wq", ".wk")):
            values[name] = unpermuted(values[name], config.head_dim)
    for i in range(config.layers):
        for ours, theirs in {"w1": "gate", "w2": "down", "w3": "up"}.items():
            for e, matrix in enumerate(of_file[f"blk.{i}.ffn_{theirs}_exps.weight"]):
                values[f"layers.{i}.experts.{e}.{ours}"] = matrix
    return values
