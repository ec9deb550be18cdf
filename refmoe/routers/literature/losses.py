# SPDX-License-Identifier: Apache-2.0
"""The auxiliary losses of a router: load balancing and router z-loss.

They exist in training only. The coefficient of such a loss (transformers: `router_aux_loss_coef`) is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.spec.softmax import softmax


def load_balancing_loss(ops: ArrayOps, logits: Sequence[Array], k: int, mask: Array | None = None) -> Array:
    """How unevenly the tokens are spread over the experts.

    AUX-1  loss = E * sum over experts e of f_e * P_e.
    AUX-2  f_e = how many of the k choices of all tokens are e, over the number of tokens: f sums to k. The choices are
           the router's own: the k largest logits, ties to the lower id (ROUTE-2, ROUTE-3).
    AUX-3  P_e = the mean over all tokens of the softmax, applied once, over all E logits of the router: P sums to 1.
    AUX-4  The tokens of all layers form one pool, and f and P are taken over the pool. (The mean of the layers' own
           losses is another number.)
    AUX-5  A token that the mask excludes, padding, is in no count, no sum and no number of tokens, in any layer.

    logits: per layer [T, E], the same tokens in the same order   mask: booleans [T], at least one true; None: all count
    returns: a scalar

    With f uniform (each f_e = k / E) or P uniform (each P_e = 1 / E) the loss is exactly k. Its supremum E is reached
    when all tokens choose the same k experts with certainty. k is the least value while f and P have the same order
    (Chebyshev's sum inequality), as for one token. In general k is no lower bound: with E = 2 and k = 1, three tokens
    that barely choose expert 0 and one that is certain of expert 1 give 7/8 in the limit.

    `load_balancing_loss_func` of transformers 5.23, models/mixtral/modeling_mixtral.py. With k = 1 and one layer this
    is Fedus et al. 2021, "Switch Transformers", eq. 4 to 6, without their alpha.
    """
    tokens = ops.concatenate([kept(layer, mask) for layer in logits])
    count, experts = tokens.shape
    _, chosen = ops.group(ops.top_k(tokens, k).reshape(-1), experts)
    frequency = ops.array(chosen) / count
    probability = ops.sum(softmax(ops, tokens), axis=0) / count
    return ops.sum(frequency * probability, axis=0) * experts


def router_z_loss(ops: ArrayOps, logits: Array, mask: Array | None = None) -> Array:
    """How large the logits of one router are.

    AUX-6  loss = the mean over tokens of the square of log(sum over all E experts of exp(logit)). It is 0, the least
           value, where each token's exponentials sum to 1; equal logits c give (c + log E)^2. Unlike routing and load
           balancing, it changes when a constant is added to a token's logits.
    AUX-7  The largest logit is subtracted before exp and added after log. The exact value does not change (SOFTMAX-1).
    AUX-8  A token that the mask excludes is in no sum and no number of tokens. (The source has no padding.)

    logits: [T, E]   mask: booleans [T], at least one true; None: all count   returns: a scalar
    Zoph et al. 2022, "ST-MoE", eq. 5. The equation is for one router and does not define a loss of several layers.
    """
    tokens = kept(logits, mask)
    largest = ops.max(tokens, axis=-1)
    log_sum = largest + ops.log(ops.sum(ops.exp(tokens - largest[:, None]), axis=-1))
    return ops.sum(log_sum * log_sum, axis=0) / tokens.shape[0]


def kept(logits: Array, mask: Array | None) -> Array:
    """The rows of the tokens that count: [T, E] to [n, E]."""
    return logits if mask is None else logits[mask]
