"""Which golden case shows each bug of router, experts, residual, precision, loading, quantisation; where none does."""

from __future__ import annotations

from dataclasses import replace

from refmoe.arithmetic.formats import FLOAT32
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.quantised_checkpoint import INT8, quantised
from refmoe.bugs.run_engine import run
from refmoe.policy.load import policy
from refmoe.policy.policy import Policy
from refmoe.spec.model import Parameters
from refmoe.traces.trace import Trace
from refmoe.verify.findings import Report
from refmoe.verify.verify import verify
from tests.bugs.judging import case_named, parameters_of

KINDS = ("router", "experts", "residual_head", "precision", "loading", "quantisation")

SHOWN_BY = {
    "router-no-renorm": "flat-router",
    "router-raw-logit-weights": "flat-router",
    "router-double-softmax": "flat-router",
    "router-renorm-wrong-axis": "packed",
    "router-softmax-over-tokens": "packed",
    "router-lowprec-logits": "near-tie",
    "router-bias-in-weights": "every-expert",
    "router-weights-order-mismatch": "skewed-weights",
    "router-tie-break-high-index": "tie-second-third",
    "router-wrong-k": "flat-router",
    "router-index-off-by-one": "every-expert",
    "router-jitter-at-eval": "experts-12",  # near-tie, which lists it, shows it in float32 and float16 only
    "router-jitter-leaks-to-experts": "near-tie",
    "router-input-unnormalised": "mini-8x7b",
    "expert-w1-w3-swapped": "mini-8x7b",
    "expert-gelu": "mini-8x7b",
    "expert-w2-transposed": "dims-distinct",
    "expert-index-permuted": "experts-12",
    "expert-only-first-token": "one-pair",
    "expert-token-index-drift": "packed",
    "expert-empty-offset-shift": "one-pair",
    "expert-int32-index-overflow": "token-sweep",
    "expert-weight-on-input": "skewed-weights",
    "expert-weight-before-w2": "skewed-weights",
    "expert-weight-missing": "skewed-weights",
    "expert-weight-rank0-for-all": "skewed-weights",
    "expert-scatter-overwrite": "mini-8x7b",
    "expert-unpermute-missing": "one-pair",
    "expert-empty-uninitialised": "one-pair",
    "resid-from-normed": "four-layers",
    "head-final-norm-missing": "mini-8x7b",
    "head-tied-wrongly": "edge-tokens",
    "hidden-tap-off-by-one": "four-layers",
    "prec-fp16-ffn-overflow": "huge-activations",
    "prec-combine-lowprec": "skewed-weights",
    "prec-logits-lowprec": "near-tie-logits",
    "load-qk-permute-missing": "dims-distinct",
    "load-sanitise-twice": "dims-distinct",  # head_dim 6: of 4 it is the same permutation as load-qk-permute-missing
    "load-k-permute-with-q-heads": "edge-tokens",  # in dims-distinct, which lists it, 12 heads do not divide 18 rows
    "load-qkv-group-layout": "dims-distinct",
    "load-experts-silently-dropped": "every-expert",
    "load-square-shape-heuristic": "square",
    "load-layer-shift": "four-layers",
    "quant-router-quantised": "mini-8x7b",
    "quant-w3-scale-dropped": "mini-8x7b",
    "quant-qk-scale-not-permuted": "mini-8x7b",
    "quant-smoothing-skips-router": "mini-8x7b",
    "quant-prefill-path-lower-precision": "mini-8x7b",
}
"""A small golden case for each bug that is a variation of a forward pass."""

OVERFLOWS = "a product past 65504 is an infinity there under float16 itself: what follows has no bound"
ALLOWED = "the policy lets an engine store that value in this dtype: under one that promises float32 there it is seen"
UNSEEN = {
    ("prec-fp16-ffn-overflow", "float16"): OVERFLOWS,
    ("prec-combine-lowprec", "bfloat16"): ALLOWED,
    ("prec-combine-lowprec", "float16"): ALLOWED,
    ("prec-logits-lowprec", "bfloat16"): ALLOWED,
}
"""Bug and dtype to why no verification can see it."""

INERT = [
    # the condition that does not hold, and a case where it does not
    ("router-lowprec-logits", "LOWPREC", "dyadic"),
    ("router-tie-break-high-index", "TIE-EDGE", "flat-router"),
    ("expert-w2-transposed", "LOAD", "mini-8x7b"),
    ("expert-index-permuted", "LOAD", "experts-12"),
    ("expert-index-permuted", "EXPERTS>10", "every-expert"),
    ("expert-only-first-token", "T>1", "mini-8x7b"),
    ("expert-token-index-drift", "T>1", "mini-8x7b"),
    ("expert-empty-offset-shift", "T>1", "mini-8x7b"),
    ("expert-empty-offset-shift", "EMPTY", "experts-12"),
    ("expert-int32-index-overflow", "LONG-ROW", "mini-8x7b"),
    ("expert-unpermute-missing", "T>1", "mini-8x7b"),
    ("expert-empty-uninitialised", "POISON", "top-all"),
    ("head-tied-wrongly", "LOAD", "edge-tokens"),
    ("prec-fp16-ffn-overflow", "LOWPREC", "dyadic"),
    ("prec-combine-lowprec", "LOWPREC", "dyadic"),
    ("prec-logits-lowprec", "LOWPREC", "dyadic"),
    ("load-qk-permute-missing", "LOAD", "dims-distinct"),
    ("load-sanitise-twice", "LOAD", "dims-distinct"),
    ("load-k-permute-with-q-heads", "LOAD", "edge-tokens"),
    ("load-qkv-group-layout", "LOAD", "dims-distinct"),
    ("load-square-shape-heuristic", "LOAD", "square"),
    ("load-square-shape-heuristic", "SQUARE", "mini-8x7b"),
    ("load-layer-shift", "LOAD", "four-layers"),
    ("quant-router-quantised", "QUANT", "mini-8x7b"),
    ("quant-w3-scale-dropped", "QUANT", "mini-8x7b"),
    ("quant-qk-scale-not-permuted", "QUANT", "mini-8x7b"),
    ("quant-qk-scale-not-permuted", "LOAD", "mini-8x7b"),
    ("quant-smoothing-skips-router", "QUANT", "mini-8x7b"),
    ("quant-prefill-path-lower-precision", "T>1", "mini-8x7b"),
    # no condition has a name for these
    ("router-no-renorm", "", "top-all"),
    ("router-double-softmax", "", "top-1"),
    ("router-weights-order-mismatch", "", "top-1"),
    ("router-wrong-k", "", "top-all"),
    ("expert-weight-on-input", "", "top-1"),
    ("expert-weight-before-w2", "", "top-1"),
    ("expert-weight-missing", "", "top-1"),
    ("expert-weight-rank0-for-all", "", "dyadic"),
    ("expert-scatter-overwrite", "", "top-1"),
    ("load-k-permute-with-q-heads", "", "square"),
    ("load-qkv-group-layout", "", "head-dim-64"),
    ("load-layer-shift", "", "dims-distinct"),
]
"""Bug, the condition that it needs, and a case without it (of T>1: its first token alone; of LOAD: equal weights)."""

STRICT = {"prec-combine-lowprec": ("combine.weighted", "combine.partial", "moe.output"),
          "prec-logits-lowprec": ("logits",)}  # fmt: skip
"""Bugs that a policy allows, and the cut points at which one that promises float32 does not."""


def mine() -> list[Mutant]:
    """The bugs of these files that are variations of a forward pass."""
    return [each for each in MUTANTS.values() if each.kind in KINDS and each.in_one_pass]


def policy_for(bug: str, dtype: str) -> Policy:
    """The policy that a bug is judged under. The generic ones allow either of two equal experts."""
    found = policy(dtype)
    return replace(found, ties="lower", compared="stored") if bug == "router-tie-break-high-index" else found


def strict(bug: str, dtype: str) -> Policy:
    """The policy that promises float32 where the bug has less, and that each step reads what was stored."""
    return replace(policy(dtype), cuts=dict.fromkeys(STRICT[bug], FLOAT32), consumers="stored")


def reference(bug: str, name: str) -> Parameters:
    """What a bug is held against: the case's parameters, or those of a quantised checkpoint, dequantised."""
    found = parameters_of(name)
    return quantised(found, INT8) if "QUANT" in MUTANTS[bug].needs else found


def traced_under(bug: str | None, name: str, parameters: Parameters, used: Policy) -> Trace:
    """The trace of an engine with this bug (None: without any)."""
    case = case_named(name)
    return run(None if bug is None else MUTANTS[bug], case.config, parameters, case.runs(), used)


def judged_under(trace: Trace, name: str, parameters: Parameters, used: Policy) -> Report:
    """The verdict about it."""
    case = case_named(name)
    return verify(trace, f"case {name}", case.config, parameters, case.runs(), used)


def judge(bug: str, dtype: str) -> tuple[Trace, Report]:
    """The engine with a bug on the case that shows it."""
    name, used = SHOWN_BY[bug], policy_for(bug, dtype)
    parameters = reference(bug, name)
    trace = traced_under(bug, name, parameters, used)
    return trace, judged_under(trace, name, parameters, used)
