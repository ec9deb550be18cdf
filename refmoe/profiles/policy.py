# SPDX-License-Identifier: Apache-2.0
"""A numeric policy: the rounding that a legal engine may do, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from refmoe.arithmetic.enclosure.budgets import Budget
from refmoe.arithmetic.formats import FORMATS, Format
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS

INNER_CUTS = {
    "weights": "parameters, as the engine holds them",
    "norm.input": "the input of a norm's statistic",
    "norm.normed": "the row divided by its root mean square, before the gain",
    "rope.table": "cosines and sines",
    "rope.products": "each product of a rotation, before the sum",
    "cache.k": "keys as the cache keeps them",
    "cache.v": "values as the cache keeps them",
    "attention.query": "queries as the product with the keys reads them, scaled where the policy scales queries",
    "attention.dots": "dot products of queries and keys, before they are scaled",
    "attention.softmax_input": "the input of the softmax of attention",
    "attention.mixing": "probabilities as the product with the values reads them",
    "router.softmax_input": "the input of the softmax of the router",
    "router.probs": "softmax over all experts, where the router takes it before it chooses; the sum of the chosen",
    "expert.sigmoid": "sigmoid of the gate, where it is a value of its own",
    "expert.silu": "gate times its sigmoid, before it multiplies the up projection",
    "combine.weighted": "an expert's output times its weight",
    "combine.partial": "sums of a token's weighted outputs but the last",
}
"""The cut points inside steps: values that are not taps but may be rounded. Every tap is a cut point too."""

CUT_POINTS = (*INNER_CUTS, *(tap for tap in (*LAYER_TAPS, *MODEL_TAPS) if tap != "router.experts"))
"""All names of cut points: those inside steps, and the taps that are real numbers."""

STATISTICS = ("norm.input", "attention.softmax_input", "router.softmax_input", "router.probs")
"""The cut points with the dtype of statistics by default. For all others the default is the dtype of storage."""

ROUTER_ORDERS = ("top-k-then-softmax", "softmax-then-top-k")
SCALES = ("scores", "query")
TIES = ("any", "lower")
COMPARED = ("stored", "unrounded")
CONSUMERS = ("stored", "unrounded")
SIGMOIDS = ("relative", "absolute")


@dataclass(frozen=True)
class Policy:
    """The legal roundings. A value may always be more precise than the dtype of its cut point."""

    name: str
    about: str
    """One line: whose arithmetic this is."""
    source: str
    """The document or the code that the policy was read from."""
    storage: Format
    """The dtype of weights, and of every value at a cut point without a dtype of its own."""
    accumulation: Format
    """The dtype of each operation inside a step, such as the sums of a matrix product."""
    statistics: Format
    """The dtype of norms, softmax and angles."""
    exp: Budget
    """The error of exp and sigmoid; x is their argument."""
    angles: Budget
    """The error of the rotary frequency of pair i; x is ln(theta^(2i/d)), the exponent given to pow."""
    circle: Budget
    """The error of cos and sin of a given angle; x is not used."""
    cuts: Mapping[str, Format] = field(default_factory=dict)
    """The cut points with a dtype other than their default."""
    scale: str = "scores"
    """The values that are multiplied by 1 / sqrt(head_dim): the scores, or the query before the product."""
    router_order: str = "top-k-then-softmax"
    """The order of softmax and choice. After a softmax, experts with equal rounded probabilities are tied."""
    compared: str = "unrounded"
    """Whether the router compares the stored logits, or may compare them before they are rounded."""
    ties: str = "any"
    """The expert that may be chosen of two with equal logits: any, or the one with the lower id."""
    consumers: str = "unrounded"
    """Whether the next step reads the stored tap, or may read it before it is rounded (fused kernels)."""
    sigmoid: str = "relative"
    """Whether the budget of exp is relative to the sigmoid, or relative to 1 (``absolute``).

    A polynomial approximation of the sigmoid has few correct digits, or none, for values far below 1.
    """
    truncates: bool = False
    """Whether an accumulator may truncate, as tensor cores do."""
    flushes: bool = False
    """Whether subnormal inputs and results of a product may become zero."""

    def at(self, cut: str) -> Format:
        """The dtype of a cut point.   cut: a name of `INNER_CUTS`, or a tap without its layer"""
        default = self.statistics if cut in STATISTICS else self.storage
        return self.cuts.get(cut, default)


__all__ = ["CUT_POINTS", "FORMATS", "INNER_CUTS", "STATISTICS", "Budget", "Policy"]
