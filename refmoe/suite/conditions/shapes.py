# SPDX-License-Identifier: Apache-2.0
"""Conditions of the shapes and constants of the model."""

from __future__ import annotations

import numpy as np

from refmoe.checkpoints.names import named_weights
from refmoe.suite.conditions.observed import Observed, condition


@condition("shape", "DIMS-DISTINCT", "no two of the model's dimensions are equal")
def _dims_distinct(seen: Observed) -> bool:
    c = seen.config
    dims = [
        c.dim, c.layers, c.heads, c.kv_heads, c.heads // c.kv_heads, c.head_dim, c.hidden_dim, c.vocab, c.experts,
        c.experts_per_token,
    ]  # fmt: skip
    return len(set(dims)) == len(dims)


@condition("shape", "SQUARE", "hidden_dim and heads x head_dim equal dim", "SQUARE")
def _square(seen: Observed) -> bool:
    return seen.config.hidden_dim == seen.config.dim == seen.config.heads * seen.config.head_dim


@condition("shape", "GQASHAPE", "K and H/K differ and both exceed 1", "GQASHAPE")
def _gqa_shape(seen: Observed) -> bool:
    k, share = seen.config.kv_heads, seen.config.heads // seen.config.kv_heads
    return k > 1 and share > 1 and k != share


@condition("shape", "MQA", "one key/value head for several query heads")
def _multi_query(seen: Observed) -> bool:
    return seen.config.kv_heads == 1 < seen.config.heads


@condition("shape", "MHA", "a key/value head for each of several query heads")
def _multi_head(seen: Observed) -> bool:
    return seen.config.kv_heads == seen.config.heads > 1


@condition("shape", "HEADDIM", "head_dim is not dim / heads")
def _head_dim_free(seen: Observed) -> bool:
    return seen.config.head_dim * seen.config.heads != seen.config.dim


@condition("shape", "HEADDIM-64", "head_dim is 64")
def _head_dim_64(seen: Observed) -> bool:
    return seen.config.head_dim == 64


@condition("shape", "LAYERS>2", "at least three layers", "LOAD")
def _three_layers(seen: Observed) -> bool:
    return seen.config.layers > 2


@condition("shape", "EXPERTS>10", "so many experts that alphabetical order is not numerical, and some of them chosen")
def _many_experts(seen: Observed) -> bool:
    return any(chosen.max() > 9 for _, chosen in seen.layers("router.experts"))


@condition("shape", "TOP-1", "one expert per token")
def _top_one(seen: Observed) -> bool:
    return seen.config.experts_per_token == 1 < seen.config.experts


@condition("shape", "TOP-3", "three experts per token, of more")
def _top_three(seen: Observed) -> bool:
    return seen.config.experts_per_token == 3 < seen.config.experts


@condition("shape", "TOP-ALL", "every expert for every token, and several of them")
def _top_all(seen: Observed) -> bool:
    return seen.config.experts_per_token == seen.config.experts > 1


@condition("shape", "THETA", "rope_theta is neither 10 000 nor 1 000 000, which engines fall back to")
def _theta(seen: Observed) -> bool:
    return seen.config.rope_theta not in (1e4, 1e6)


@condition("shape", "GAINS", "no norm's gain is constant")
def _gains(seen: Observed) -> bool:
    weights = named_weights(seen.case.checkpoint().parameters)
    return all(len(np.unique(weight.read())) > 1 for weight in weights.values() if len(weight.shape) == 1)


@condition("shape", "LOAD", "no parameter equals another, or its own transpose, of the same shape", "LOAD")
def _asymmetric(seen: Observed) -> bool:
    values = [weight.read() for weight in named_weights(seen.case.checkpoint().parameters).values()]
    contents = {(value.shape, value.tobytes()) for value in values}
    mirrored = any(value.ndim == 2 and len(value) > 1 and np.array_equal(value, value.T) for value in values)
    return len(contents) == len(values) and not mirrored
