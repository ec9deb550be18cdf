# SPDX-License-Identifier: Apache-2.0
"""Other arithmetic than declared: the policy with one change, or the storage of the whole engine in another dtype.

A coarser policy allows more errors, whatever their cause. So a change is named only if it predicts the errors: their
values, where it stores something more coarsely, or else their sizes, as `refmoe.verifier.diagnosis.fit` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from refmoe.arithmetic.formats import FLOAT16
from refmoe.errors import InputError
from refmoe.profiles.cut_points import CUT_POINTS, PRODUCTS, PROJECTIONS
from refmoe.profiles.load import CODES, GROUPS, differences
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import HALVES, Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run
from refmoe.verifier.diagnosis.known import Cause
from refmoe.verifier.findings import ARITHMETIC

WIDE_SUMS = "attention.mixing=float32+attention.context.accumulation=float32"
"""The sums over values of llama.cpp, where its cache has codes."""
TURNED = {"any-order": "of heads turned by a Hadamard matrix", "none": "of heads that are not turned"}
BLOCKS = {
    f"cache={name}+attention.query=q8_0+{WIDE_SUMS}+turn={turn}": (
        f"keys and values are cached in codes, {name} {about}, as in llama.cpp"
    )
    for name in ("q8_0", "q4_0")
    for turn, about in TURNED.items()
} | {
    "cache=float16+attention.query=float16+attention.mixing=float16+attention.context.accumulation=float16": (
        "keys and values are cached in float16, and values are summed in it, as in llama.cpp without codes"
    )
}
"""The caches of llama.cpp, each with what goes with it there. Where pairs stand apart, no engine has them."""
FLOATS = {
    f"cache={kind}-cache{how}": f"keys and values are cached as FP8 {kind.upper()}, with a scale of 1, {about}"
    for kind in ("e4m3", "e5m2")
    for how, about in (("", "rounded to even"), ("-truncated", "rounded toward zero"))
}
"""The caches of engines that keep floats of eight bits. They compute in 16 bits."""
TURNS = {
    "turn=none": "heads are not turned before they are cached in codes",
    "turn=any-order": "heads are turned by a Hadamard matrix before they are cached in codes, by sums in some order",
}

CHANGES = {
    **TURNS,
    **BLOCKS,
    **FLOATS,
    "attention.context.accumulation=float16": "attention sums values in float16, as flash attention of llama.cpp does",
    "attention.context.accumulation=bfloat16": "attention sums values in bfloat16",
    "linear.input=float16+router.logits.input=float32": (
        "inputs of products are rounded to float16, but not the router's, as llama.cpp does with a float16 file"
    ),
    "linear.input=bfloat16+router.logits.input=float32": (
        "inputs of products are rounded to bfloat16, but not the router's, as llama.cpp does with a bfloat16 file"
    ),
    "linear.input=float16": "the inputs of products with parameters are rounded to float16",
    "linear.input=bfloat16": "the inputs of products with parameters are rounded to bfloat16",
    "codes=float32": "inputs of products are not rounded to codes",
    "codes=float16": "inputs of products are rounded to float16, and not to codes",
    "codes=q8_0": "inputs become codes by one rule for all formats of matrices, as those of Q8_0 in llama.cpp",
    "codes=q8_2": "inputs become codes with a bfloat16 scale, as in ik_llama.cpp",
    **{
        f"ranks={n}": f"several ranks, at least {n}, store their parts of sums in the storage dtype, and add them in it"
        for n in (2, 4, 8)
    },
    "ranks=8+rank.partial=bfloat16": "several ranks store their parts of sums in bfloat16, and add them in it",
    **{f"{step}.accumulation=float32": f"the product {step} is computed in float32" for step in PRODUCTS},
    "islands=float32": "norms, rotations and softmax are computed in float32",
    "cache=float16": "keys and values are cached in float16",
    "cache=bfloat16": "keys and values are cached in bfloat16",
    "router_order=softmax-then-top-k": "the router takes the softmax of all logits, and chooses experts then",
    "router_order=softmax-then-top-k+router.probs=bfloat16": (
        "the router takes the softmax of all logits, stores it in bfloat16, and chooses experts then"
    ),
    "router_order=softmax-then-top-k+router.probs=float16": (
        "the router takes the softmax of all logits, stores it in float16, and chooses experts then"
    ),
    "storage=bfloat16": "the whole engine computes in bfloat16",
    "storage=float16": "the whole engine computes in float16",
    "truncates=true": "sums are cut off, not rounded, as tensor cores do",
    "flushes=true": "numbers below the smallest normal one count as zero",
    "statistics=float16": "norms, softmax and angles are computed in float16",
    "statistics=bfloat16": "norms, softmax and angles are computed in bfloat16",
    "sigmoid=absolute": "a sigmoid is precise to some units of the roundoff of 1, not of its own, as in onnxruntime",
    "accumulation=float16": "sums are accumulated in float16",
    "accumulation=bfloat16": "sums are accumulated in bfloat16",
}
"""Changes of a policy, as `refmoe verify --policy NAME+CHANGE` takes them. Narrow ones come first."""

EVERYWHERE = tuple(tap for tap in (*LAYER_TAPS, *MODEL_TAPS) if tap != "router.experts")
"""Of a choice the policy itself says what is legal."""

FIRST = {
    "router_order": ("router.weights",),
    "sigmoid": ("expert.hidden",),
    "ranks": CUT_POINTS["rank.partial"].shown_by,
    "turn": (*CUT_POINTS["cache.k"].shown_by, *CUT_POINTS["cache.v"].shown_by),
    CODES: (*PROJECTIONS,),
}
"""The first taps that a field of a policy can alter, if these are few."""


@dataclass(frozen=True)
class Changed:
    """The specification under another policy, as a variation."""

    changed: Policy
    touches: tuple[str, ...] = EVERYWHERE

    def model(self, config: Config, parameters: Parameters) -> Model:
        return Model(config, parameters, CUT_STEPS)

    def policy(self, policy: Policy) -> Policy:
        """The changed policy, with what another variation changes as well."""
        return self.changed

    def runs(self, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        return runs


def other_arithmetic(policy: Policy, head_dim: int) -> Iterator[Cause]:
    """The changes of a policy as causes, each once, but for those that heads of this size cannot have."""
    seen: list[Policy] = []
    for change, about in CHANGES.items():
        changed = _changed(policy, change)
        if changed is None or any(how.block and head_dim % how.block for how in changed.kept.values()):
            continue
        rules = replace(changed, name="")
        if rules not in seen:
            seen.append(rules)
            yield Cause(
                name=f"{policy.name}+{change}",
                kind=ARITHMETIC,
                about=about,
                fix="if that is meant, declare it; refmoe policies says what each policy allows",
                variation=Changed(changed, touched_by(change)),
            )


def _changed(policy: Policy, change: str) -> Policy | None:
    """The policy with the change. None if it has it already, is not one of refmoe's own, or cannot have it.

    Rows of any length may have one scale. They need not be whole blocks of other codes.
    """
    if change.startswith(f"{CODES}=") and any(not each.block for each in policy.codes):
        return None
    if (change in TURNS and not policy.kept) or (change in BLOCKS and policy.pairs == HALVES):
        return None
    if change in FLOATS and policy.storage.precision > FLOAT16.precision:
        return None
    try:
        changed = named_policy(f"{policy.name}+{change}")
    except InputError:
        return None
    return changed if differences([policy, changed]) else None


def touched_by(change: str) -> tuple[str, ...]:
    """The first taps that a change can alter."""
    touched: dict[str, None] = {}
    for part in change.split("+"):
        field = part.partition("=")[0]
        for name in GROUPS.get(field, (field,)):
            touched |= dict.fromkeys(CUT_POINTS[name].shown_by if name in CUT_POINTS else FIRST.get(name, EVERYWHERE))
    return tuple(touched)
