# SPDX-License-Identifier: Apache-2.0
"""The first failed step alone, under another policy: the cheapest refutation of other arithmetic.

The step is enclosed from the trace's own values, as in a pass over the whole trace. The checks before it passed. So if
it fails from its inputs as they are stored, and as they were before that, no later pass can change its verdict.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.profiles.policy import Policy
from refmoe.verifier.diagnosis.evidence import Evidence, ops_under
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory
from refmoe.verifier.findings import FAIL, LOCAL
from refmoe.verifier.passes import Key, is_rotated


class OneStep(Laboratory):
    """The steps of a trace, each alone, under a policy that may round at other cut points."""

    def __init__(self, evidence: Evidence, policy: Policy, unrounded: bool = False) -> None:
        """unrounded: whether steps may have read their inputs before these were stored"""
        super().__init__(replace(evidence, policy=policy), unrounded)
        self.ops = ops_under(evidence, policy)(policy, None)
        present = evidence.contents.present
        self._anchored = {run.sequence for run in self.runs.values() if any(map(is_rotated, present[run.run]))}

    def weight(self, name: str, layer: int | None, expert: int | None = None) -> Any:
        """The parameter itself, by whose name the ops know its product."""
        return self.parameter(name, layer, expert)

    def gain(self, step: str, layer: int | None) -> Any:
        return self.ops.vector(self.parameter(step, layer))

    def compute(self, key: Key, given: dict[str, Any]) -> Any:
        self.ops.any_offset = self.runs[key[0]].sequence not in self._anchored
        return super().compute(key, given)


def fails_alone(evidence: Evidence, policy: Policy) -> bool:
    """Whether the first failed check fails under a policy too, by its step alone."""
    first = evidence.failed[0]
    if first.rung != LOCAL or first.step == "router.experts":
        return False
    key = (first.run, first.tap)
    with np.errstate(all="ignore"):
        labs = (OneStep(evidence, policy, unrounded) for unrounded in (False, policy.consumers == "unrounded"))
        return all(lab.check(key, lab.right(key)).verdict == FAIL for lab in labs)
