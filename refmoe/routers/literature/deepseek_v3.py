# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3: sigmoid scores, a bias used only for selection, and selection limited to a few groups of experts."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.normal import softplus
from refmoe.routers.literature.record import Routing
from refmoe.spec.softmax import softmax


def deepseek_v3(
    ops: ArrayOps, logits: Array, k: int, bias: Array | None = None, groups: int = 1, top_groups: int = 1,
    scaling: float = 1.0,
) -> Routing:  # fmt: skip
    """The k experts with the largest biased scores in the best groups, weighted by their scores without the bias.

    DEEPSEEK-1  s = sigmoid(logits): the score of an expert does not depend on the other experts.
    DEEPSEEK-2  The bias of an expert is added to its score for the selection of groups and of experts, and nowhere
                else.
    DEEPSEEK-3  The E experts form `groups` equal runs of consecutive ids. The score of a group is the sum of its two
                largest biased scores; the experts of the `top_groups` best groups stay, of equal groups the lower one.
    DEEPSEEK-4  Of those, the k largest biased scores are chosen, largest first, of equal ones the lower id.
    DEEPSEEK-5  weight = scaling * s / (sum of s over the chosen). It is computed as the softmax of
                log s = -softplus(-logit), which is equal, and defined even where every s rounds to zero.
    DEEPSEEK-6  No token is dropped.

    logits: [T, E]   bias: [E]   k at most top_groups * E / groups
    DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", eq. 12 to 16; groups and scaling as in `DeepseekV3TopkRouter` of
    transformers, which adds 1e-20 to the sum.
    """
    tokens, experts = logits.shape
    scores = ops.sigmoid(logits)
    biased = scores if bias is None else scores + bias
    by_group = biased.reshape(tokens * groups, experts // groups)
    best = ops.gather(by_group, ops.top_k(by_group, min(2, experts // groups)))
    chosen = ops.top_k(ops.sum(best, axis=-1).reshape(tokens, groups), top_groups)
    stays = (chosen[:, :, None] == ops.integers(range(experts)) // (experts // groups)).any(axis=1)
    ids = ops.top_k(ops.where(stays, biased, float("-inf")), k)
    weights = softmax(ops, -softplus(ops, -ops.gather(logits, ids))) * scaling
    return admit(ops, ids, weights, experts)


def update_bias(ops: ArrayOps, bias: Array, counts: Array, speed: float = 0.001) -> Array:
    """The bias of the next training step.

    DEEPSEEK-7  The bias of an expert with more than the mean load of the step falls by `speed`. With less than the mean
                load it rises by `speed`; with the mean load it stays.

    bias: [E]   counts: integers [E], slots per expert   returns: [E]
    DeepSeek-AI 2024, section 2.1.2.
    """
    excess = counts * len(counts) - counts.sum()
    step = ops.array(ops.integers(excess < 0)) - ops.array(ops.integers(excess > 0))
    return bias + step * speed


def sequence_balance_loss(ops: ArrayOps, logits: Array, k: int) -> Array:
    """The complementary balance loss of one sequence, without its coefficient alpha.

    DEEPSEEK-8  loss = sum over experts of f_e * P_e; f_e = E / (k T) times how many tokens have e among their k largest
                scores, without bias and groups; P_e = the mean over tokens of s_e / (sum of all s). It is 1 when f or
                P is even.

    logits: [T, E]   returns: a scalar
    DeepSeek-AI 2024, eq. 17 to 20.
    """
    tokens, experts = logits.shape
    scores = ops.sigmoid(logits)
    _, counts = ops.group(ops.top_k(scores, k).reshape(-1), experts)
    frequency = ops.array(counts) * experts / (k * tokens)
    share = scores / ops.sum(scores, axis=-1)[:, None]
    return ops.sum(frequency * (ops.sum(share, axis=0) / tokens), axis=0)
