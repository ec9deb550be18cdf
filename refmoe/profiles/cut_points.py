# SPDX-License-Identifier: Apache-2.0
"""The cut points: the places where a value may be rounded, each with its default dtype and the taps that show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS

NORMS = ("attention_norm", "moe_norm", "final_norm")


@dataclass(frozen=True)
class CutPoint:
    """A place where an engine may round."""

    about: str
    """The value that is rounded, in words."""
    shown_by: tuple[str, ...]
    """The first taps that such a rounding can change."""
    default: str = "storage"
    """The field of the policy, or the cut point, whose dtype it has if the policy gives none."""


INNER_CUTS = {
    "weights": CutPoint("parameters, as the engine holds them", ("embedding", "every step with a parameter")),
    "norm.input": CutPoint("the input of a norm's statistic", NORMS, "statistics"),
    "norm.normed": CutPoint("the row divided by its root mean square, before the gain", NORMS),
    "rope.table": CutPoint("cosines and sines", ("attention.q_rope", "attention.k_rope")),
    "rope.products": CutPoint("each product of a rotation, before the sum", ("attention.q_rope", "attention.k_rope")),
    "cache.k": CutPoint("keys as the cache keeps them", ("attention.scores",)),
    "cache.v": CutPoint("values as the cache keeps them", ("attention.context",)),
    "attention.query": CutPoint(
        "queries as the product with the keys reads them, scaled where the policy scales queries", ("attention.scores",)
    ),
    "attention.dots": CutPoint("dot products of queries and keys, before they are scaled", ("attention.scores",)),
    "attention.softmax_input": CutPoint("the input of the softmax of attention", ("attention.probs",), "statistics"),
    "attention.mixing": CutPoint("probabilities as the product with the values reads them", ("attention.context",)),
    "router.softmax_input": CutPoint("the input of the softmax of the router", ("router.weights",), "statistics"),
    "router.probs": CutPoint(
        "softmax over all experts, where the router takes it before it chooses; the sum of the chosen",
        ("router.experts", "router.weights"),
        "statistics",
    ),
    "expert.sigmoid": CutPoint("sigmoid of the gate, where it is a value of its own", ("expert.hidden",)),
    "expert.silu": CutPoint("gate times its sigmoid, before it multiplies the up projection", ("expert.hidden",)),
    "combine.weighted": CutPoint("an expert's output times its weight", ("moe.output",)),
    "combine.partial": CutPoint("sums of a token's weighted outputs but the last", ("moe.output",)),
}
"""The cut points inside steps: values that are not taps but may be rounded. Every tap is a cut point too."""

PROJECTIONS = {
    "attention.q": ("wq", "attention_norm"),
    "attention.k": ("wk", "attention_norm"),
    "attention.v": ("wv", "attention_norm"),
    "attention.output": ("wo", "attention.context"),
    "router.logits": ("gate", "moe_norm"),
    "expert.gate": ("w1", "moe_norm"),
    "expert.up": ("w3", "moe_norm"),
    "expert.output": ("w2", "expert.hidden"),
    "logits": ("output", "final_norm"),
}
"""The steps that multiply by a matrix of parameters: the last part of its canonical name, and the tap they read."""

PRODUCTS = (*PROJECTIONS, "attention.scores", "attention.context")
"""The steps that are matrix products."""

ROW_PARALLEL = ("attention.output", "expert.output")
"""The products that an engine on several ranks sums over them. A rank has a block of the terms, in order."""

INPUT_CUTS = {
    f"{step}.input": CutPoint(f"{read} as the product {step} reads it", (step,), read)
    for step, (_, read) in PROJECTIONS.items()
}
"""The inputs of products with parameters. They may be coarser than the tap that holds the same value."""

ACCUMULATION_CUTS = {
    f"{step}.accumulation": CutPoint(f"factors and partial sums of the product {step}", (step,), "accumulation")
    for step in PRODUCTS
} | {
    "expert.silu.accumulation": CutPoint(
        "the gate and its sigmoid while silu is computed", ("expert.hidden",), "accumulation"
    )
}
"""The arithmetic of single operations. All others have the policy's `accumulation`."""

RANK_CUTS = {
    "rank.partial": CutPoint(
        "the part of a sum that one rank has, and partial sums over ranks; only with ranks above 1",
        (*ROW_PARALLEL, "moe.output"),
    )
}

TAP_CUTS = {tap: CutPoint(f"the tap {tap}", (tap,)) for tap in (*LAYER_TAPS, *MODEL_TAPS) if tap != "router.experts"}
"""The taps that are real numbers."""

READ_OUT_CUTS = {
    "logprobs.softmax_input": CutPoint("the input of the log-softmax", ("logprobs",), "statistics"),
    "logprobs.sum": CutPoint(
        "the sum of exponentials of a log-softmax, and its logarithm", ("logprobs",), "statistics"
    ),
    "logprobs": CutPoint("the tap logprobs, which is computed in the dtype of statistics", ("logprobs",)),
}
"""The cut points of log-probabilities, which are computed from the logits."""

CUT_POINTS = {**INNER_CUTS, **INPUT_CUTS, **ACCUMULATION_CUTS, **RANK_CUTS, **TAP_CUTS, **READ_OUT_CUTS}
"""All cut points by name."""

STATISTICS = tuple(name for name, cut in CUT_POINTS.items() if cut.default == "statistics")
"""The cut points with the dtype of statistics by default."""

ISLANDS = (
    "norm.normed", *NORMS, "rope.table", "rope.products", "attention.q_rope", "attention.k_rope", "attention.probs",
    "router.weights",
)  # fmt: skip
"""The cut points of norms, rotations and softmax, which many engines of wide dtypes compute in float32."""

KEPT_IN_CODES = ("cache.k", "cache.v", "attention.query")
"""The cut points whose values a policy may keep as codes with scales, along each head."""
ROTATED = ("cache.k", "attention.query")
"""The cut points of `KEPT_IN_CODES` that hold rotary pairs."""

CODED_TOGETHER = {"attention.q": "attention_norm", "expert.gate": "moe_norm"}
"""The taps whose codes several products read, each by the first of these products. The router reads no codes."""

TENSOR_FORMATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The names of dtypes as formats of a stored tensor."""

_STEP_OF = {matrix: step for step, (matrix, _) in PROJECTIONS.items()}


def product_of(weight: Any) -> str | None:
    """The product that reads this parameter, by its canonical name. None if the weight has no such name."""
    return _STEP_OF.get(getattr(weight, "name", "").rpartition(".")[2])


def format_of(weight: Any) -> str:
    """The format in which a parameter is stored: the name of a quantised format such as ``Q4_K``, or of a dtype."""
    found: str = getattr(weight, "format", None) or TENSOR_FORMATS.get(str(weight.dtype), "")
    return found
