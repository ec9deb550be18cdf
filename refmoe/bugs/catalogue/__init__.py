# SPDX-License-Identifier: Apache-2.0
"""The catalogue of known bugs: one file per class. Importing it registers all of them in `MUTANTS`."""

from refmoe.bugs.catalogue import (
    attention,
    aux_loss,
    decode_sampling,
    embedding,
    experts,
    kv_cache,
    loading,
    parallel,
    precision,
    quantisation,
    residual_head,
    rmsnorm,
    rope,
    router,
    tokenizer,
)
from refmoe.bugs.mutant import MUTANTS

__all__ = [
    "MUTANTS",
    "attention",
    "aux_loss",
    "decode_sampling",
    "embedding",
    "experts",
    "kv_cache",
    "loading",
    "parallel",
    "precision",
    "quantisation",
    "residual_head",
    "rmsnorm",
    "rope",
    "router",
    "tokenizer",
]
