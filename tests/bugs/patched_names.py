# SPDX-License-Identifier: Apache-2.0
"""The names of the faults of `tests.verifier.faults` in the catalogue, and the reasons why some have none."""

from __future__ import annotations

from tests.bugs.patched import Patched
from tests.verifier import faults_of_attention, faults_of_cache, faults_of_experts, faults_of_norms, faults_of_rope
from tests.verifier.faults import FAULTS, Fault

PARTS = (faults_of_attention, faults_of_cache, faults_of_experts, faults_of_norms, faults_of_rope)
"""Imported because they register faults."""

NAMES: dict[str, str] = {
    # attention
    "heads-tiled": "attn-gqa-tile",
    "scale-missing": "attn-scale-missing",
    "window-on": "attn-swa-wrongly-on",
    "window-one-too-long": "attn-swa-off-by-one",
    "softmax-over-queries": "attn-softmax-wrong-axis",
    "softmax-in-bfloat16": "attn-softmax-lowprec",
    # router and experts
    "router-weights-not-renormalised": "router-no-renorm",
    "router-softmax-twice": "router-double-softmax",
    "router-softmax-in-bfloat16": "router-lowprec-logits",
    "router-reads-the-residual": "router-input-unnormalised",
    "gate-and-up-swapped": "expert-w1-w3-swapped",
    "gelu": "expert-gelu",
    "weight-missing": "expert-weight-missing",
    "last-expert-overwrites": "expert-scatter-overwrite",
    # norms, residual stream, embedding, output
    "norm-subtracts-the-mean": "norm-layernorm-mean",
    "norm-gains-of-the-other-norm": "norm-pair-swapped",
    "norm-eps-1e-6": "norm-eps-1e-6",
    "norm-gain-plus-one": "norm-gain-plus-one",
    "norm-eps-outside-the-root": "norm-eps-outside-sqrt",
    "norm-statistic-in-the-storage-type": "norm-lowprec-variance",
    "final-norm-missing": "head-final-norm-missing",
    "residual-from-the-norm": "resid-from-normed",
    "embedding-scaled": "emb-scale-sqrt-d",
    "output-tied-to-the-embedding": "head-tied-wrongly",
    "logits-in-bfloat16": "prec-logits-lowprec",
    # rotary positions
    "rope-interleaved": "rope-interleaved-vs-half",
    "rope-sign": "rope-sign-flipped",
    "rope-theta-1e4": "rope-theta-default",
    "rope-positions-restart": "rope-decode-position-zero",
    "rope-angles-in-the-storage-type": "rope-tables-lowprec",
}  # fmt: skip
"""The mutant of each fault that is the same bug."""

UNKNOWN: dict[str, str] = {
    "key-heads-swapped": "no bug of the catalogue reverses heads",
    "scale-of-the-hidden-size": "no bug of the catalogue scales by another root",
    "mask-shows-the-next-token": "no bug of the catalogue shows the future",
    "softmax-off-by-one": "not in the catalogue",
    "probs-truncated": "no bug of the catalogue truncates",
    "context-heads-not-transposed": "not in the catalogue",
    "output-projection-of-another-layer": "load-layer-shift moves all parameters of a layer, this one",
    "query-bias": "not in the catalogue",
    "cache-writes-one-slot-early": "no bug of the catalogue overwrites the last token",
    "cache-drops-the-oldest": "the catalogue's loses it at the boundary of a window only",
    "cache-turned-again": "each call turns the keys as they were cached; the catalogue's keeps what it has turned",
    "cache-shared-by-layers": "not in the catalogue",
    "cache-in-float8": "not in the catalogue",
    "router-sigmoid": "not in the catalogue",
    "router-takes-second-and-third": "not in the catalogue",
    "router-takes-the-lowest": "not in the catalogue",
    "router-bias": "the catalogue's bias is on probabilities, and its logits are right",
    "relu": "not in the catalogue",
    "silu-in-bfloat16": "not in the catalogue",
    "down-projections-off-by-one": "the catalogue's moves all three matrices of an expert",
    "down-drops-its-last-term": "not in the catalogue",
    "down-drops-its-last-32-terms": "the catalogue's loses the terms after the last whole tile",
    "down-sums-in-float16": "not in the catalogue",
    "down-sums-in-bfloat16": "not in the catalogue",
    "down-truncated": "not in the catalogue",
    "weight-twice": "not in the catalogue",
    "weights-swapped": "the catalogue's writes the weights that it uses; these are used in another order than written",
    "weight-in-bfloat16": "the catalogue's rounds products and sums, which transformers does anyway",
    "expert-over-capacity": "the catalogue's counts first choices first, up to an even share; this one counts to four",
    "norm-divides-by-n-1": "not in the catalogue",
    "residual-added-twice": "the catalogue's, of a sharded run, adds what attention has added to as well",
    "residual-in-bfloat16": "not in the catalogue",
    "embedding-of-the-next-token": "not in the catalogue",
    "tensor-float-32": "not in the catalogue",
    "rope-key-not-turned": "not in the catalogue",
    "rope-frequencies-to-the-end": "not in the catalogue",
    "rope-positions-from-one": "the catalogue's is one ahead for decoded tokens only",
    "rope-table-in-bfloat16": "the catalogue's rounds positions and frequencies too",
    "rope-turns-values": "not in the catalogue",
}
"""The faults without a name, each with the reason: no bug of the catalogue computes the same function."""

KIN: dict[str, tuple[str, str]] = {
    "mask-hides-the-token-itself": ("attn-causal-strict", "calls with several tokens only: a single one sees itself"),
    "mask-aligned-top-left": ("attn-causal-top-left", "single queries too: these see the first key alone"),
    "window-off": ("attn-swa-dropped-in-one-backend", "decoding too, and prompts here are shorter than the window"),
    "gate-and-up-swapped-on-load": ("expert-w1-w3-swapped", "in the weights: gate and up are shown exchanged"),
    "experts-off-by-one": ("router-index-off-by-one", "the other way: the expert before the one that was chosen"),
    "norm-in-float16": ("norm-lowprec-variance", "in float16, where the storage type is bfloat16"),
    "rope-positions-in-bfloat16": ("rope-tables-lowprec", "positions alone: frequencies and angles are float32"),
}
"""The faults that are the same mistake as a mutant, with another effect; the difference in words. No bug of the
catalogue
computes this function, so no name is required, but the name of the mutant is not wrong."""


BOUND = ("window-on",)
"""Faults that are another bug on another model, here on one with a window."""


def known_faults() -> list[Patched]:
    """The faults, with their names."""
    names = (*NAMES, *UNKNOWN, *KIN)
    assert sorted(names) == sorted(FAULTS), "a fault has no name, or two"
    return [known(each) for each in FAULTS.values()]


def known(fault: Fault) -> Patched:
    """A fault with its name."""
    kin, other = KIN.get(fault.name, ("", ""))
    why = UNKNOWN.get(fault.name, other)
    called = (NAMES[fault.name],) if fault.name in NAMES else ()
    return Patched(
        name=fault.name,
        model=fault.model,
        called=called,
        why=why,
        apply=fault.apply,
        kin=kin,
        elsewhere=fault.name not in BOUND,
    )
