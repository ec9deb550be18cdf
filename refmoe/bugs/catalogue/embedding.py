# SPDX-License-Identifier: Apache-2.0
"""Bugs of the embedding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.bugs.changed_weights import mapped
from refmoe.bugs.mutant import PARAMETERS, mutant
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters

PAD = 2
"""The id of the end of sequence, which is also the padding id of a tokenizer without one."""


@mutant(
    "emb-scale-sqrt-d", breaks=["MODEL-1"], touches=["embedding"], changes=PARAMETERS,
    fix="do not scale the embedding: that is Gemma's", severity="medium",
    sources=["https://github.com/mattn/tensai/pull/248"],
)  # fmt: skip
def table_times_root(config: Config, parameters: Parameters) -> Parameters:
    """The embedding table is multiplied by sqrt(dim), in float32, when it is loaded. Another model needs that."""
    root = np.float32(math.sqrt(config.dim))
    return replace(parameters, embedding=mapped(parameters.embedding, lambda table: table.astype(np.float32) * root))


@mutant(
    "emb-pad-row-zeroed", breaks=["MODEL-1"], touches=["embedding"], needs=["EDGE-IDS"], changes=PARAMETERS,
    fix="leave the row of padding_idx as it is stored: its id is an ordinary token too", severity="low",
    sources=["https://github.com/meta-llama/llama/issues/481"],
)  # fmt: skip
def pad_row_cleared(config: Config, parameters: Parameters) -> Parameters:
    """The padding id is also the end of sequence, and an embedding with a padding_idx clears that row."""

    def cleared(table: Any) -> Any:
        table = np.array(table)
        table[PAD : PAD + 1] = 0
        return table

    return replace(parameters, embedding=mapped(parameters.embedding, cleared))
