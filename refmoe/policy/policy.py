"""A numeric policy: the rounding that a legal engine may do, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from refmoe.arithmetic.enclosure.budgets import Budget
from refmoe.arithmetic.formats import FORMATS, Format
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS

INNER_CUTS = {
    "weights": "parameters, as the engine holds them",
    "norm.input": "what a norm's statistic is computed from",
    "norm.normed": "the row divided by its root mean square, before the gain",
    "rope.table": "cosines and sines",
    "rope.products": "each product of a rotation, before the sum",
    "cache.k": "keys as the cache keeps them",
    "cache.v": "values as the cache keeps them",
    "attention.query": "queries as the product with the keys reads them, scaled where the policy scales queries",
    "attention.dots": "dot products of queries and keys, before they are scaled",
    "attention.softmax_input": "what the softmax of attention reads",
    "attention.mixing": "probabilities as the product with the values reads them",
    "router.softmax_input": "what the softmax of the router reads",
    "router.probs": "softmax over all experts, where the router takes it before it chooses; the sum of the chosen",
    "expert.sigmoid": "sigmoid of the gate, where it is a value of its own",
    "expert.silu": "gate times its sigmoid, before it multiplies the up projection",
    "combine.weighted": "an expert's output times its weight",
    "combine.partial": "sums of a token's weighted outputs but the last",
}
"""Cut points inside steps, where a value may be rounded without being a tap. Every tap is a cut point too."""

CUT_POINTS = (*INNER_CUTS, *(tap for tap in (*LAYER_TAPS, *MODEL_TAPS) if tap != "router.experts"))
"""Every name that `Policy.cuts` may have: the cut points inside steps, and the taps that are real numbers."""

STATISTICS = ("norm.input", "attention.softmax_input", "router.softmax_input", "router.probs")
"""Cut points whose dtype is that of statistics where a policy does not name one; for all others it is storage."""

ROUTER_ORDERS = ("top-k-then-softmax", "softmax-then-top-k")
SCALES = ("scores", "query")
TIES = ("any", "lower")
COMPARED = ("stored", "unrounded")
CONSUMERS = ("stored", "unrounded")
SIGMOIDS = ("relative", "absolute")


@dataclass(frozen=True)
class Policy:
    """What rounding is legal. A value may always be more precise than its cut point says."""

    name: str
    about: str
    """One line: whose arithmetic this is."""
    source: str
    """Where it is written or what was read."""
    storage: Format
    """The dtype of weights, and of every value at a cut point that is not listed otherwise."""
    accumulation: Format
    """The dtype of each operation inside a step, such as the sums of a matrix product."""
    statistics: Format
    """The dtype of norms, softmax and angles."""
    exp: Budget
    """exp and sigmoid; x is their argument."""
    angles: Budget
    """The rotary frequency of pair i; x is the natural logarithm of theta^(2i/d), the exponent that pow is given."""
    circle: Budget
    """cos and sin of a given angle; x is not used."""
    cuts: Mapping[str, Format] = field(default_factory=dict)
    """Cut points whose dtype is not that of storage (or of statistics, for those of `STATISTICS`)."""
    scale: str = "scores"
    """What is multiplied by 1 / sqrt(head_dim): the scores, or the query before the product."""
    router_order: str = "top-k-then-softmax"
    """Which comes first. After a softmax, experts whose probabilities underflow or round alike are tied."""
    compared: str = "unrounded"
    """Whether the router compares the logits as stored, or may compare them before they are rounded."""
    ties: str = "any"
    """Which of two equal experts may be chosen: any, or the one with the lower id."""
    consumers: str = "unrounded"
    """Whether the next step reads a tap as stored, or may read it before it is rounded (fused kernels)."""
    sigmoid: str = "relative"
    """Whether the budget of exp holds for a sigmoid itself, or only for 1 plus it: an approximation of it by a
    polynomial has few digits, or none, where it is far below 1."""
    truncates: bool = False
    """Whether an accumulator may truncate, as tensor cores do."""
    flushes: bool = False
    """Whether subnormal inputs and results of a product may become zero."""

    def at(self, cut: str) -> Format:
        """The dtype of a cut point: a name of `INNER_CUTS`, or a tap without its layer."""
        default = self.statistics if cut in STATISTICS else self.storage
        return self.cuts.get(cut, default)


__all__ = ["CUT_POINTS", "FORMATS", "INNER_CUTS", "STATISTICS", "Budget", "Policy"]
