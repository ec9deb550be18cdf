# SPDX-License-Identifier: Apache-2.0
"""Other arithmetic than declared: the policy with one change, under which every failed check passes.

A coarser policy allows more errors, whatever their cause. So a change is named only if the errors also have the size
that it predicts.
"""

from __future__ import annotations

import math

from refmoe.errors import InputError
from refmoe.profiles.load import policy as named_policy
from refmoe.profiles.policy import Policy
from refmoe.verifier.diagnosis.evidence import Evidence, checks_again
from refmoe.verifier.findings import FAIL, PASS, Check, Explanation, proven
from refmoe.verifier.passes import Pass

ARITHMETIC = "other arithmetic"
"""The kind of these explanations."""
CHANGES = {
    "cache=float16": "keys and values are cached in float16",
    "cache=bfloat16": "keys and values are cached in bfloat16",
    "truncates=true": "sums are cut off, not rounded, as tensor cores do",
    "flushes=true": "numbers below the smallest normal one count as zero",
    "statistics=float16": "norms, softmax and angles are computed in float16",
    "statistics=bfloat16": "norms, softmax and angles are computed in bfloat16",
    "sigmoid=absolute": "a sigmoid is precise to some units of the roundoff of 1, not of its own, as in onnxruntime",
    "accumulation=float16": "sums are accumulated in float16",
    "accumulation=bfloat16": "sums are accumulated in bfloat16",
}
"""Changes of a policy, as `refmoe verify --policy NAME+CHANGE` takes them."""
LEAST = 0.1
"""The least size of the errors, in standard deviations of the changed policy. Smaller errors have another cause."""


def other_arithmetic(evidence: Evidence) -> list[Explanation]:
    """The changes under which every check passes, best first: the one that predicts the size of the errors best."""
    found = []
    for change, about in CHANGES.items():
        changed = _changed(evidence.policy, change)
        if changed is None:
            continue
        checks = {(c.run, c.tap): c for c in checks_again(evidence, evidence.right, changed, Pass)}
        failed = [checks[check.run, check.tap] for check in evidence.failed]
        legal = all(c.verdict != FAIL for c in checks.values()) and all(c.verdict == PASS for c in failed)
        if legal and (size := _size(failed)) >= LEAST:
            found.append((abs(math.log(size)), change, f"{about}: {size:.2g} times the expected error"))
    return [
        proven(
            name=f"{evidence.policy.name}+{change}",
            kind=ARITHMETIC,
            about=about,
            fix="if that is meant, declare it; refmoe policies says what each policy allows",
        )
        for _, change, about in sorted(found)
    ]


def _changed(policy: Policy, change: str) -> Policy | None:
    """The policy with the change. None if the policy already has it, or is not one of refmoe's own."""
    try:
        changed = named_policy(f"{policy.name}+{change}")
    except InputError:
        return None
    field, _, value = change.partition("=")
    if field in ("accumulation", "statistics") and str(getattr(policy, field)) == value:
        return None
    return changed


def _size(checks: list[Check]) -> float:
    """Root mean square of error over standard deviation, over all values of these checks."""
    values = sum(check.values for check in checks)
    return math.sqrt(sum(check.rms**2 * check.values for check in checks) / values) if values else 0.0
