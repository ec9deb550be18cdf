# SPDX-License-Identifier: Apache-2.0
"""A pass that reads no value of any engine: what is legal, or how wide, from the tokens alone."""

from __future__ import annotations

from typing import Any

from refmoe.profiles.policy import Policy
from refmoe.spec.model import Caches, Model
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Header
from refmoe.verifier.passes import Pass
from refmoe.verifier.subject import Subject
from refmoe.verifier.tally import Limits

NO_TAP = frozenset({""})
"""Not empty, so that a pass computes a whole call; without the name of any tap, so that it reads nothing."""


class FreePass(Pass):
    """A pass over all steps of all calls, from the tokens on. A subclass looks at the enclosures in `_tap`.

    A verification computes nothing but the caches of a call of which the trace holds no tap. Here all are computed.
    """

    looks_beyond = True

    def __init__(self, subject: Subject, policy: Policy, limits: Limits) -> None:
        """limits: those of a verification of this size"""
        super().__init__(held_trace(Header(runs=subject.runs), {}), subject, policy, limits)
        self._anchored = {run.sequence for run in subject.runs}  # positions begin where the calls say

    def _block(self, model: Model, layers: range, tokens: Any, positions: Any, before: Caches | None) -> Caches:
        self._present = NO_TAP
        return super()._block(model, layers, tokens, positions, before)
