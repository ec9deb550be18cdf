"""The catalogue: one file per class of bug. Importing it registers all of them."""

from refmoe.mutants.catalogue import (
    aux_loss,
    decode_sampling,
    experts,
    loading,
    parallel,
    precision,
    quantisation,
    residual_head,
    rmsnorm,
    router,
    tokenizer,
)
from refmoe.mutants.mutant import MUTANTS

__all__ = [
    "MUTANTS",
    "aux_loss",
    "decode_sampling",
    "experts",
    "loading",
    "parallel",
    "precision",
    "quantisation",
    "residual_head",
    "rmsnorm",
    "router",
    "tokenizer",
]
