# SPDX-License-Identifier: Apache-2.0
"""Logits and log-probabilities under each other's name. They differ by a number for each position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.spec.taps import IDS, LOGPROBS
from refmoe.verifier.diagnosis.evidence import Evidence
from refmoe.verifier.findings import FAIL, PASS, STRUCTURE, Explanation, proven
from refmoe.verifier.segments import Settings
from refmoe.verifier.verify import verify

NORMALISED = 1 / 16
"""The largest logarithm of a sum of probabilities that counts as that of 1. Stored ones are rounded."""

WORDS = {
    "logits": ("log-probabilities instead of logits", "dump the logits before the log-softmax, or name them logprobs"),
    LOGPROBS: ("logits instead of log-probabilities", "take the log-softmax, or name them logits"),
}
"""Per tap the name and the fix of values that belong under the other name."""


def under_the_other_name(evidence: Evidence) -> list[Explanation]:
    """The explanation of a trace whose wrong values all pass under the other name. Empty for any other trace."""
    steps = {check.step for check in evidence.failed}
    if len(steps) != 1 or not steps <= WORDS.keys():
        return []
    (wrong,) = steps
    right = LOGPROBS if wrong == "logits" else "logits"
    tensors, names = evidence.trace.tensors, {key.rpartition("/")[2] for key in evidence.trace.tensors}
    if right in names or IDS in names or not _are_distinct(evidence, wrong):
        return []
    renamed: dict[str, Any] = {
        f"{run}/{right if tap == wrong else tap}": tensor
        for (run, _, tap), tensor in ((key.rpartition("/"), tensor) for key, tensor in tensors.items())
    }
    subject, report = evidence.right, evidence.report
    settings = Settings(significance=report.significance)
    again = verify(
        replace(evidence.trace, tensors=renamed), report.subject, subject.config, subject.parameters,
        evidence.contents.runs, evidence.policy, settings,
    )  # fmt: skip
    checks = [check for check in again.checks if check.step == right]
    if any(check.verdict == FAIL for check in again.checks) or {check.verdict for check in checks} != {PASS}:
        return []
    name, fix = WORDS[wrong]
    about = f"the values under {wrong} are legal {right}: each row is off by a constant"
    return [
        proven(name=f"{wrong}: {name}", kind=STRUCTURE, about=about, fix=fix, coefficient=1.0, residual=0.0,
               values=evidence.wrong_values)
    ]  # fmt: skip


def _are_distinct(evidence: Evidence, wrong: str) -> bool:
    """Whether the failed rows look like values of the other name: the exponentials of log-probabilities sum to 1.

    wrong: the name in the trace. All rows named logits must sum to 1, and no row named log-probabilities may.
    """
    for key in ((check.run, check.tap) for check in evidence.failed):
        values = np.asarray(evidence.trace.get(*key), np.float64)
        most = values.max(-1)
        total = most + np.log(np.exp(values - most[:, None]).sum(-1))
        near = np.abs(total) <= NORMALISED
        if not (near.all() if wrong == "logits" else not near.any()):
            return False
    return True
