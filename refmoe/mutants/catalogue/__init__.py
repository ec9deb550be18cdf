"""The catalogue: one file per class of bug. Importing it registers all of them."""

from refmoe.mutants.catalogue import (
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
from refmoe.mutants.mutant import MUTANTS

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
