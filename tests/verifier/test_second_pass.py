# SPDX-License-Identifier: Apache-2.0
"""A check that passes only in a second pass has the numbers of that pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refmoe.profiles.load import policy
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute, plan
from refmoe.traces.trace import Header, Recorder, Trace
from refmoe.verifier.findings import CONFORMANT, PASS
from refmoe.verifier.verify import verify
from tests.models import SMALL, random_model

RUNS = plan([("prefill", 0, [(7 + 5 * i) % SMALL.vocab for i in range(34)])], SMALL.vocab)


class Fused(PolicyOps):
    """An engine that goes on with every value before it is stored."""

    def tap(self, name: str, x: Any) -> Any:
        super().tap(name, x)
        return x


def fused_trace(used: str) -> Trace:
    recorder = Recorder()
    model = replace(random_model(), steps=CUT_STEPS)
    execute(Fused(policy(used), recorder), model, RUNS, recorder)
    header = Header(runs=RUNS, case=None, checkpoint=None, policy=used, producer={"name": "fused"})
    return held_trace(header, recorder.arrays, "fused")


def test_the_numbers_of_a_passed_check_are_below_their_limits() -> None:
    report = verify(fused_trace("bfloat16"), "fused", SMALL, random_model().parameters, None, policy("bfloat16"))
    assert report.verdict == CONFORMANT
    stored = replace(policy("bfloat16"), consumers="stored")
    narrow = verify(fused_trace("bfloat16"), "fused", SMALL, random_model().parameters, None, stored)
    wrong = {(check.run, check.tap) for check in narrow.checks if check.verdict != PASS}
    assert wrong, "no step needs the second pass, so that this test shows nothing"
    for check in report.checks:
        assert check.verdict == PASS
        assert check.outside == 0
        assert check.worst_error <= 1
        if check.step != "router.experts":
            assert check.excess <= check.excess_limit
    reasons = [check.reason for check in report.checks if (check.run, check.tap) in wrong]
    assert all("before it was stored" in reason for reason in reasons)
