# SPDX-License-Identifier: Apache-2.0
"""A numeric policy: the rounding that a legal engine may do, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refmoe.arithmetic.codes import InputFormat
from refmoe.arithmetic.enclosure.budgets import Budget
from refmoe.arithmetic.formats import FORMATS, Format
from refmoe.profiles.cut_points import CUT_POINTS, format_of, product_of

ROUTER_ORDERS = ("top-k-then-softmax", "softmax-then-top-k")
SCALES = ("scores", "query")
TIES = ("any", "lower")
COMPARED = ("stored", "unrounded")
CONSUMERS = ("stored", "unrounded")
SIGMOIDS = ("relative", "absolute")
HALVES = "halves"
PAIRS = (HALVES, "interleaved")
UNTURNED, STAGES, ANY_ORDER = "none", "stages", "any-order"
TURNS = (UNTURNED, STAGES, ANY_ORDER)
TURNED = 64
"""Heads of a multiple of this many values may be turned."""


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
    """The error of exp and sigmoid, and of a logarithm of such values; x is the argument, or the logarithm."""
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
    pairs: str = HALVES
    """Where the elements of a rotary pair stand in a head whose values share scales: half a head apart, or together."""
    turn: str = UNTURNED
    """The order of sums in which a Hadamard matrix turns heads before they are kept in codes.

    Heads are turned whose size is a multiple of `TURNED`. Queries are turned as the keys are. Keys are turned in blocks
    of the largest power of two that divides a head, values in blocks of `TURNED`. The context is turned back.
    """
    truncates: bool = False
    """Whether an accumulator may truncate, as tensor cores do."""
    flushes: bool = False
    """Whether subnormal inputs and results of a product may become zero."""
    ranks: int = 1
    """The number of ranks that share the terms of `ROW_PARALLEL` products, or the experts of a token.

    Each rank may store its part of the sum as `rank.partial`, and the parts are added in any order in that dtype.
    """
    inputs: Mapping[str, InputFormat | Format] = field(default_factory=dict)
    """Per format of a matrix what becomes of the other factor of its products: codes, or values of a dtype.

    It belongs to the format of the tensor, not of the file, because a file may hold several. An entry for one product
    and a format, such as ``expert.gate.int8-channel``, comes before that of the format.
    """
    kept: Mapping[str, InputFormat] = field(default_factory=dict)
    """The cut points of `KEPT_IN_CODES` whose values become codes and scales. Their dtype is then not used."""

    def input_of(self, weight: Any) -> InputFormat | Format | None:
        """The format of the input of products with this matrix; None: the dtype of its cut point."""
        if not self.inputs:
            return None
        matrix = format_of(weight)
        return self.inputs.get(f"{product_of(weight)}.{matrix}", self.inputs.get(matrix))

    def turned(self, cut: str, width: int) -> int:
        """How many values of a head are turned together before this cut point; 0: they are not turned.

        cut: ``cache.k``, with the queries as well, or ``cache.v``   width: of a head
        """
        if self.turn == UNTURNED or cut not in self.kept or width % TURNED:
            return 0
        return TURNED if cut == "cache.v" else width & -width

    @property
    def codes(self) -> tuple[InputFormat, ...]:
        """The formats of codes of products and of the cache, each once, in the order of their names."""
        coded = (*self.inputs.values(), *self.kept.values())
        found = {each.name: each for each in coded if isinstance(each, InputFormat)}
        return tuple(found[name] for name in sorted(found))

    def at(self, cut: str) -> Format:
        """The dtype of a cut point.   cut: a name of `CUT_POINTS`; a tap without its layer"""
        found = self.cuts.get(cut)
        if found is not None:
            return found
        default = CUT_POINTS[cut].default if cut in CUT_POINTS else "storage"
        format: Format = self.at(default) if default in CUT_POINTS else getattr(self, default)
        return format


FIELDS = {
    "storage": "the dtype of weights, and of every cut point without a dtype of its own",
    "accumulation": "the dtype of each operation inside a step, such as the sums of a matrix product",
    "statistics": "the dtype of norms, softmax and angles",
    "scale": "the values multiplied by 1 / sqrt(head_dim): the scores, or the query before the product",
    "router_order": "whether the router chooses before or after its softmax",
    "compared": "whether the router compares the stored logits, or may compare them before they are rounded",
    "ties": "the expert chosen of two with equal logits: any, or the one with the lower id",
    "consumers": "whether the next step reads the stored tap, or may read it before it is rounded (fused kernels)",
    "sigmoid": "whether the error of the sigmoid is relative to it, or relative to 1",
    "pairs": "whether the elements of a rotary pair stand half a head apart or together, where heads are kept in codes",
    "turn": (
        "the order of sums by which a Hadamard matrix turns heads of a multiple of 64, where they are kept in codes; "
        "none: they are not turned"
    ),
    "truncates": "whether an accumulator may cut off, as tensor cores do",
    "flushes": "whether subnormal inputs and results of a product may become zero",
    "ranks": "the ranks that share the sums of attention.output and expert.output, or the experts of a token",
    "inputs": "per format of a matrix the codes or the dtype that a product with it makes of its input",
    "exp": "the error that exp, sigmoid and the log of a softmax may have, in units of the roundoff of statistics",
    "angles": "the error of a rotary frequency, relative, in the same units",
    "circle": "the error of cosine and sine, absolute, in the same units",
}
"""Every field of a policy but its texts and cut points, in words."""

__all__ = ["FIELDS", "FORMATS", "Budget", "Policy"]
