# SPDX-License-Identifier: Apache-2.0
"""Other arithmetic than declared: the policy with one change, or the storage of the whole engine in another dtype.

A coarser policy allows more errors, whatever their cause. So a change is named only if it predicts the errors: their
values, where it stores something more coarsely, or else their sizes, as `refmoe.verifier.diagnosis.fit` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from refmoe.errors import InputError
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run
from refmoe.verifier.diagnosis.known import Cause
from refmoe.verifier.findings import ARITHMETIC

CHANGES = {
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
"""Changes of a policy, as `refmoe verify --policy NAME+CHANGE` takes them."""

EVERYWHERE = (*LAYER_TAPS, *MODEL_TAPS)


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


def other_arithmetic(policy: Policy) -> Iterator[Cause]:
    """The changes of a policy as causes."""
    for change, about in CHANGES.items():
        changed = _changed(policy, change)
        if changed is not None:
            yield Cause(
                name=f"{policy.name}+{change}",
                kind=ARITHMETIC,
                about=about,
                fix="if that is meant, declare it; refmoe policies says what each policy allows",
                variation=Changed(changed),
            )


def _changed(policy: Policy, change: str) -> Policy | None:
    """The policy with the change. None if the policy already has it, or is not one of refmoe's own."""
    try:
        changed = named_policy(f"{policy.name}+{change}")
    except InputError:
        return None
    for part in change.split("+"):
        field, _, value = part.partition("=")
        if field in ("accumulation", "statistics", "storage") and str(getattr(policy, field)) == value:
            return None
    return changed
