# SPDX-License-Identifier: Apache-2.0
"""Bugs of routers."""

from __future__ import annotations

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.bugs.kernels.bug import bug

BIAS = (-3.0, -2.5, 0.0, -4.0, -1.5, -3.5, -2.0, -5.0)


def sigmoid(logits: Array) -> Array:
    with np.errstate(all="ignore"):
        return (1 / (1 + np.exp(-logits))).astype(logits.dtype)


@bug(
    "sum-of-zero",
    "Sigmoids of very negative logits are 0, and normalising them without the declared epsilon divides 0 by 0.",
    "flashinfer-ai/flashinfer/pull/3803",
    "2026-07-02",
    "router",
    experts=4,
    top_k=2,
    scoring="sigmoid",
    epsilon=1e-20,
)
def sum_of_zero(logits: Array) -> tuple[Array, Array]:
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    shares = np.take_along_axis(sigmoid(logits), ids, axis=1)
    with np.errstate(all="ignore"):
        return ids, shares / shares.sum(axis=1, keepdims=True)


@bug(
    "least-score-is-minus-one",
    "The search for the largest score begins at -1 with expert 0, which biased scores may all be below.",
    "vllm-project/vllm/pull/31478",
    "2025-12-29",
    "router",
    experts=8,
    top_k=2,
    scoring="sigmoid",
    bias=BIAS,
)
def least_score_is_minus_one(logits: Array) -> tuple[Array, Array]:
    scores = sigmoid(logits) + np.array(BIAS, logits.dtype)
    ids = np.zeros((len(logits), 2), np.int64)
    for token, row in enumerate(scores):
        row = row.copy()
        for slot in range(2):
            best, found = -1.0, 0
            for number, score in enumerate(row):
                if score > best:
                    best, found = float(score), number
            ids[token, slot] = found
            row[found] = -np.inf
    shares = np.take_along_axis(sigmoid(logits), ids, axis=1)
    with np.errstate(all="ignore"):
        return ids, shares / shares.sum(axis=1, keepdims=True)


@bug(
    "always-normalised",
    "Softmax over the chosen logits alone, which normalises, where the model does not.",
    "lablup/mlxcel/pull/391",
    "2026-06-21",
    "router",
    experts=8,
    top_k=2,
    normalised=False,
)
def always_normalised(logits: Array) -> tuple[Array, Array]:
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    chosen = np.take_along_axis(logits, ids, axis=1)
    with np.errstate(all="ignore"):
        shares = np.exp(chosen - chosen[:, :1])
    return ids, shares / shares.sum(axis=1, keepdims=True)


@bug(
    "never-normalised",
    "The argument that asks for normalised weights is taken and not passed on.",
    "vllm-project/vllm/pull/31246",
    "2026-01-08",
    "router",
    experts=8,
    top_k=2,
    scoring="sigmoid",
)
def never_normalised(logits: Array) -> tuple[Array, Array]:
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    return ids, np.take_along_axis(sigmoid(logits), ids, axis=1)
