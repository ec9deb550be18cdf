# SPDX-License-Identifier: Apache-2.0
"""The ideal engine of a policy that may have a bug of sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Tap
from refmoe.arithmetic.codes import InputFormat, quantise
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.quantised.coarse_sums import CoarseSums, added_up
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.coded import groups_of
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder, Run, Trace


class IdealOps(PolicyOps):
    """`PolicyOps`, whose sums of products of codes are coarse where the policy's codes say so."""

    def _times_codes(self, x: Any, weight: Any, coded: InputFormat) -> Any:
        if not isinstance(coded, CoarseSums):
            return super()._times_codes(x, weight, coded)
        codes = quantise(x.reshape(-1, x.shape[-1]), coded)
        made, _ = added_up(codes, groups_of(weight), weight.factors(0, weight.shape[0]), coded)
        return made.reshape(*x.shape[:-1], -1)


def ideal_ops(policy: Policy, tap: Tap | None = None) -> PolicyOps:
    """The arithmetic of the ideal engine of a policy, or of a bug's policy."""
    return IdealOps(policy, tap)


def run(bug: Mutant | None, config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Trace:
    """The trace of an engine with this bug; None: without any bug. It claims the policy without the bug."""
    recorder = Recorder()
    model = Model(config, parameters, CUT_STEPS) if bug is None else bug.model(config, parameters)
    used, made = (policy, runs) if bug is None else (bug.policy(policy), bug.runs(runs))
    with np.errstate(all="ignore"):
        execute(ideal_ops(used, recorder), model, made, recorder)
    name = "specification" if bug is None else bug.id
    return held_trace(
        Header(runs=runs, case=None, checkpoint=None, policy=policy.name, producer={"name": name}),
        recorder.arrays, name,
    )  # fmt: skip
