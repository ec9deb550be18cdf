"""The catalogue: one file per class of bug. Importing it registers all of them."""

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
