# SPDX-License-Identifier: Apache-2.0
"""The tables of the bugs of a forward pass: a golden case that shows each bug, and cases that do not.

The bugs that no forward pass shows are tested in `test_outside` and `test_sharding`.
"""

from __future__ import annotations

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant

GROUPS = (
    ("attention", "kv_cache"),
    ("rmsnorm", "embedding", "rope"),
    ("router", "experts", "residual_head", "precision", "loading", "quantisation"),
)
"""The files of the catalogue, in groups. A diagnosis is tested among all bugs of a group."""

SHOWN_BY = {
    "attn-scale-missing": "walking-skeleton",
    "attn-causal-strict": "walking-skeleton",
    "attn-causal-top-left": "window-chunks",
    "attn-swa-wrongly-on": "walking-skeleton",  # window-lengths has a window of its own
    "attn-swa-off-by-one": "window-decode",
    "attn-swa-dropped-in-one-backend": "window-chunks",
    "attn-window-none-as-zero": "walking-skeleton",  # the cases that list it have a window
    "attn-mask-polarity-inverted": "batch-ragged",
    "attn-gqa-tile": "dims-distinct",
    "attn-gqa-index-by-nkv": "dims-distinct",
    "attn-wo-head-order": "dims-distinct",
    "attn-softmax-lowprec": "mini-8x7b",  # attention-underflow does not show it in bfloat16
    "attn-softmax-wrong-axis": "walking-skeleton",
    "attn-fully-masked-row-nan": "batch-ragged",
    "cache-write-hole": "shared-prefix",
    "cache-length-rounded-up": "one-shot-chunked-stepwise",
    "cache-window-update-at-boundary": "window-decode",
    "cache-chunk-larger-than-window": "window-chunks",
    "cache-prefill-skips-tokens": "one-shot-chunked-stepwise",
    "cache-stale-tail-after-trim": "shared-prefix",
    "norm-eps-1e-6": "tiny-embedding",
    "norm-eps-outside-sqrt": "tiny-embedding",
    "norm-lowprec-variance": "huge-embedding",
    "norm-applied-twice": "mean-not-zero",
    "norm-layernorm-mean": "mean-not-zero",
    "norm-pair-swapped": "four-layers",
    "emb-scale-sqrt-d": "edge-tokens",
    "emb-pad-row-zeroed": "edge-tokens",
    "rope-theta-default": "head-dim-64",
    "rope-tables-lowprec": "positions-256",
    "rope-table-too-short": "positions-4096",
    "rope-unwanted-scaling": "head-dim-64",
    "rope-interleaved-vs-half": "head-dim-64",
    "rope-sign-flipped": "walking-skeleton",
    "rope-decode-position-zero": "one-shot-chunked-stepwise",
    "rope-decode-position-plus-one": "window-decode",
    "rope-offset-from-kept-rows": "window-decode",
    "rope-reapplied-to-cache": "one-shot-chunked-stepwise",
    "rope-batch-row0-only": "batch-ragged",
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
    "router-jitter-at-eval": "experts-12",  # near-tie shows it only in float32 and float16
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
    "load-sanitise-twice": "dims-distinct",  # with head_dim 4 it equals load-qk-permute-missing
    "load-k-permute-with-q-heads": "edge-tokens",  # in dims-distinct 12 heads do not divide 18 rows
    "load-qkv-group-layout": "dims-distinct",
    "load-experts-silently-dropped": "every-expert",
    "load-square-shape-heuristic": "square",
    "load-layer-shift": "four-layers",
    "quant-router-quantised": "mini-8x7b",
    "quant-w3-scale-dropped": "mini-8x7b",
    "quant-qk-scale-not-permuted": "mini-8x7b",
    "quant-smoothing-skips-router": "mini-8x7b",
    "quant-prefill-path-lower-precision": "mini-8x7b",
    "attn-fully-masked-block-nan": "window-chunks",
    "attn-swa-window-of-first-row": "window-chunks",
    "attn-graph-length-frozen": "shared-prefix",
    "attn-empty-prefix-poisons": "walking-skeleton",
    "attn-scale-of-derived-head-dim": "head-dim-free",
    "cache-ring-written-before-chunk": "window-chunks",
    "cache-rejected-values-stay": "shared-prefix",
    "cache-value-scale-not-applied": "walking-skeleton",
    "norm-gain-plus-one": "four-layers",
    "rope-graph-position-frozen": "walking-skeleton",
    "router-first-experts-only": "experts-12",
    "router-sort-powers-of-two": "flat-router",
    "router-negative-logits-lost": "flat-router",
    "expert-graph-reads-frozen-buffer": "mini-8x7b",
    "expert-replica-summed-twice": "every-expert",
    "expert-weights-of-first-token": "skewed-weights",
    "expert-rows-of-ranks-exchanged": "mini-8x7b",
    "expert-padding-not-zero": "mini-8x7b",
    "expert-reduction-tail-lost": "mini-8x7b",
    "expert-swiglu-limit-default-zero": "mini-8x7b",
    "expert-capacity-drops-tokens": "one-pair",
    "resid-from-moe-norm": "four-layers",
    "load-gate-up-blocks-as-halves": "every-expert",
    "load-gate-up-sharded-as-one": "every-expert",
    "load-expert-adapters-dropped": "every-expert",
    "load-expert-adapters-mispaired": "every-expert",
}
"""A small golden case for each bug that is a variation of a forward pass. A comment names cases that do not serve."""

MET_SINCE = (
    "attn-fully-masked-block-nan", "attn-swa-window-of-first-row", "attn-graph-length-frozen",
    "attn-empty-prefix-poisons", "attn-scale-of-derived-head-dim", "cache-ring-written-before-chunk",
    "cache-rejected-values-stay", "cache-value-scale-not-applied", "norm-gain-plus-one", "rope-graph-position-frozen",
    "router-first-experts-only", "router-sort-powers-of-two", "router-negative-logits-lost",
    "expert-graph-reads-frozen-buffer", "expert-replica-summed-twice", "expert-weights-of-first-token",
    "expert-rows-of-ranks-exchanged", "expert-padding-not-zero", "expert-reduction-tail-lost",
    "expert-swiglu-limit-default-zero", "expert-capacity-drops-tokens", "resid-from-moe-norm",
    "load-gate-up-blocks-as-halves", "load-gate-up-sharded-as-one", "load-expert-adapters-dropped",
    "load-expert-adapters-mispaired",
)  # fmt: skip
"""The bugs that were met after the golden cases were written."""

NOT_LISTED = (
    "attn-swa-wrongly-on", "attn-window-none-as-zero", "attn-softmax-lowprec", "attn-softmax-wrong-axis",
    "router-jitter-at-eval", "load-sanitise-twice", "load-k-permute-with-q-heads", "quant-router-quantised",
    "quant-w3-scale-dropped", "quant-qk-scale-not-permuted", "quant-smoothing-skips-router",
    "quant-prefill-path-lower-precision", *MET_SINCE,
)  # fmt: skip
"""The bugs that their case does not list, although it has all that they need."""

NAMED_FAST = (
    "attn-scale-missing", "attn-causal-top-left", "attn-window-none-as-zero", "attn-gqa-tile", "attn-wo-head-order",
    "cache-window-update-at-boundary", "cache-chunk-larger-than-window",
    "norm-lowprec-variance", "emb-pad-row-zeroed", "rope-unwanted-scaling", "rope-batch-row0-only",
    "router-softmax-over-tokens", "expert-unpermute-missing", "hidden-tap-off-by-one", "prec-logits-lowprec",
    "load-sanitise-twice", "quant-smoothing-skips-router",
)  # fmt: skip
"""The bugs whose diagnosis the default run tests."""

OVERFLOWS = "a product past 65504 is an infinity there under float16 itself: what follows has no bound"
ALLOWED = "the policy lets an engine store that value in this dtype: under one that promises float32 there it is seen"
UNSEEN = {
    ("prec-fp16-ffn-overflow", "float16"): OVERFLOWS,
    ("prec-combine-lowprec", "bfloat16"): ALLOWED,
    ("prec-combine-lowprec", "float16"): ALLOWED,
    ("prec-logits-lowprec", "bfloat16"): ALLOWED,
}
"""Bug and dtype, with the reason why no verification can see the bug."""

STRICT = {
    "prec-combine-lowprec": ("combine.weighted", "combine.partial", "moe.output"),
    "prec-logits-lowprec": ("logits",),
}
"""The bugs that a policy allows, and the cut points at which a policy that promises float32 does not."""

INERT = [
    ("attn-causal-strict", "T>1", "walking-skeleton"),
    ("attn-swa-wrongly-on", "T>1", "walking-skeleton"),
    ("attn-swa-off-by-one", "SWA", "walking-skeleton"),
    ("attn-swa-dropped-in-one-backend", "SWA", "walking-skeleton"),
    ("attn-window-none-as-zero", "T>1", "walking-skeleton"),
    ("attn-mask-polarity-inverted", "T>1", "walking-skeleton"),
    ("attn-softmax-lowprec", "LOWPREC", "dyadic"),
    ("attn-softmax-wrong-axis", "T>1", "walking-skeleton"),
    ("attn-fully-masked-row-nan", "RAGGED", "walking-skeleton"),
    ("cache-write-hole", "DECODE", "packed"),
    ("cache-length-rounded-up", "DECODE", "packed"),
    ("cache-window-update-at-boundary", "DECODE-ACROSS-W", "window-chunks"),
    ("cache-chunk-larger-than-window", "SWA", "one-shot-chunked-stepwise"),
    ("cache-stale-tail-after-trim", "SEQMIX", "walking-skeleton"),
    ("norm-lowprec-variance", "LOWPREC", "dyadic"),
    ("emb-pad-row-zeroed", "EDGE-IDS", "mini-8x7b"),
    ("rope-theta-default", "T>1", "mini-8x7b"),
    ("rope-tables-lowprec", "T>1", "mini-8x7b"),
    ("rope-tables-lowprec", "LOWPREC", "dyadic"),
    ("rope-table-too-short", "P>4096", "positions-2048"),
    ("rope-unwanted-scaling", "T>1", "mini-8x7b"),
    ("rope-interleaved-vs-half", "T>1", "mini-8x7b"),
    ("rope-sign-flipped", "T>1", "mini-8x7b"),
    ("rope-decode-position-zero", "DECODE", "one-pair"),
    ("rope-decode-position-plus-one", "DECODE", "one-pair"),
    ("rope-offset-from-kept-rows", "DECODE", "one-pair"),
    ("rope-offset-from-kept-rows", "SWA", "mini-8x7b"),
    ("rope-reapplied-to-cache", "DECODE", "one-pair"),
    ("rope-batch-row0-only", "BATCH", "window-lengths"),
    ("norm-pair-swapped", "LOAD", "four-layers"),
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
    ("attn-fully-masked-block-nan", "SWA", "walking-skeleton"),
    ("attn-swa-window-of-first-row", "SWA", "one-shot-chunked-stepwise"),
    ("attn-graph-length-frozen", "DECODE", "packed"),
    ("attn-empty-prefix-poisons", "T>1", "walking-skeleton"),
    ("attn-scale-of-derived-head-dim", "HEADDIM", "mini-8x7b"),
    ("cache-ring-written-before-chunk", "SWA", "one-shot-chunked-stepwise"),
    ("cache-rejected-values-stay", "SEQMIX", "walking-skeleton"),
    ("rope-graph-position-frozen", "DECODE", "one-pair"),
    ("router-first-experts-only", "EXPERTS>10", "every-expert"),
    ("router-sort-powers-of-two", "", "mini-8x7b"),
    ("expert-graph-reads-frozen-buffer", "DECODE", "one-pair"),
    ("expert-weights-of-first-token", "T>1", "mini-8x7b"),
    ("expert-rows-of-ranks-exchanged", "T>1", "mini-8x7b"),
    ("expert-reduction-tail-lost", "", "walking-skeleton"),
    ("expert-capacity-drops-tokens", "T>1", "mini-8x7b"),
    ("load-gate-up-blocks-as-halves", "LOAD", "every-expert"),
    ("load-gate-up-sharded-as-one", "LOAD", "every-expert"),
    ("load-expert-adapters-mispaired", "LOAD", "every-expert"),
    # no condition has a name for the following: as many query heads as key/value heads, or one of these; no piece after
    # another piece (CHUNK leaves out those longer than the cache) or none longer than the window; a window of its own;
    # one expert per token, or all of them; equal layers
    ("attn-gqa-tile", "", "square"),
    ("attn-gqa-tile", "", "head-dim-64"),
    ("attn-gqa-index-by-nkv", "", "head-dim-64"),
    ("attn-wo-head-order", "", "square"),
    ("attn-wo-head-order", "", "head-dim-64"),
    ("attn-causal-top-left", "", "mini-8x7b"),
    ("cache-prefill-skips-tokens", "", "mini-8x7b"),
    ("cache-chunk-larger-than-window", "", "window-lengths"),
    ("attn-swa-wrongly-on", "", "window-decode"),
    ("attn-window-none-as-zero", "", "window-decode"),
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
"""Bug, the condition that it needs, and a case without it. Of T>1: its first token alone. Of LOAD: equal weights."""

HIDDEN = [
    ("norm-eps-1e-6", "TINYMAG", "mini-8x7b"),
    ("norm-eps-outside-sqrt", "TINYMAG", "mini-8x7b"),
]
"""Bug, condition and case, for bugs that change less than bfloat16 resolves: 10^-5 of rows of ordinary size."""


def bugs() -> list[Mutant]:
    """The bugs of all groups that are variations of a forward pass."""
    kinds = {kind for group in GROUPS for kind in group}
    return [each for each in MUTANTS.values() if each.kind in kinds and each.in_one_pass]


def rivals(bug: str) -> list[Mutant]:
    """The bugs of the same group, this one included."""
    group = next(group for group in GROUPS if MUTANTS[bug].kind in group)
    return [each for each in bugs() if each.kind in group]
