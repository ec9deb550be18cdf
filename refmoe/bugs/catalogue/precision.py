# SPDX-License-Identifier: Apache-2.0
"""Bugs of precision: a value that is stored too coarsely, or that exceeds the range of its dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, Format
from refmoe.bugs.forced_rounding import low_precision
from refmoe.bugs.mutant import POLICY, mutant
from refmoe.profiles.policy import Policy

ALLOWED = (
    "the policy itself stores {what} in {format}: in no golden case does it change one of the {count} values of {tap}, "
    "of which the worst, the specification's own, is {worst} of the allowed error away from the exact one"
)
"""The reason why a policy allows a bug, measured over all golden cases: the bug changes no value."""

TERMS = {"what": "weighted outputs and their partial sums", "tap": "moe.output", "count": "34,076"}
HIDDEN = (
    "the policy itself stores that product in float16: in no golden case does it change one of the 60,244 values of "
    "expert.hidden, and past 65504, where both are infinite, nothing that follows has a bound to break"
)


def cut_to(policy: Policy, format: Format, *names: str) -> Policy:
    """The policy of an engine that rounds to this dtype at these cut points."""
    return replace(policy, cuts={**policy.cuts, **dict.fromkeys(names, format)})


@mutant(
    "prec-fp16-ffn-overflow", breaks=["EXPERT-2"], touches=["expert.hidden"], needs=["LOWPREC"], changes=POLICY,
    fix="keep the product of silu and up in bfloat16 or float32, or scale it: float16 ends at 65504",
    sources=[
        "https://github.com/huggingface/transformers/issues/27179",
        "https://github.com/ggml-org/llama.cpp/pull/27016",
    ],
    unseen={"float16": HIDDEN},
)  # fmt: skip
def hidden_in_float16(policy: Policy) -> Policy:
    """The product silu(gate) x up is stored in float16: it is rounded, and is infinite from 65520 on."""
    return cut_to(policy, FLOAT16, "expert.hidden")


@mutant(
    "prec-combine-lowprec", breaks=["COMBINE-1"], touches=["moe.output"], needs=["LOWPREC"], changes=POLICY,
    fix="weigh and add the experts' outputs in float32", severity="low",
    sources=[
        "https://github.com/mlc-ai/pith-train/pull/5",
        "https://github.com/NVIDIA/TensorRT-Model-Connect/pull/930",
    ],
    unseen={
        "bfloat16": ALLOWED.format(**TERMS, format="bfloat16", worst="0.990"),
        "float16": ALLOWED.format(**TERMS, format="float16", worst="0.990"),
    },
)  # fmt: skip
def combined_in_low_precision(policy: Policy) -> Policy:
    """Each weighted output, and each partial sum of them, is rounded to bfloat16, or to the low dtype of the model."""
    return cut_to(policy, low_precision(policy), "combine.weighted", "combine.partial", "moe.output")


@mutant(
    "prec-nondeterministic-combine", breaks=["COMBINE-1"], touches=["moe.output"], needs=["REPEAT"],
    fix="add a token's outputs in a fixed order, without atomics", severity="low",
    sources=["https://github.com/huggingface/transformers/pull/43362"],
    equivalent="Any order of the sum is legal under every policy, so each run alone is right; only the same call "
    "twice, compared bit by bit, shows it, and with two experts per token not even that: two terms commute",
)  # fmt: skip
def combine(ops: Any, outputs: Any, weights: Any) -> Any:
    """Atomic additions add a token's outputs in an order that differs from run to run. Here the order is reversed."""
    weighted = ops.cut("combine.weighted", outputs * weights[:, :, None])
    return ops.accumulate(weighted[:, ::-1], axis=1)


@mutant(
    "prec-logits-lowprec", breaks=["MODEL-3"], touches=["logits"], needs=["LOWPREC"], changes=POLICY,
    fix="produce the logits in float32", severity="low",
    unseen={
        "bfloat16": ALLOWED.format(what="logits", tap="logits", count="47,363", format="bfloat16", worst="0.999"),
    },
)  # fmt: skip
def logits_in_bfloat16(policy: Policy) -> Policy:
    """The logits are stored in bfloat16. If two logits are closer than 8 bits resolve, either may become the
    largest."""
    return cut_to(policy, BFLOAT16, "logits")
