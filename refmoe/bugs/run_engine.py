# SPDX-License-Identifier: Apache-2.0
"""The run of the specification, or of a mutant, as a foreign engine: calls go in, a trace in memory comes out."""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.bugs.mutant import Mutant
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder, Run, Trace


def run(mutant: Mutant | None, config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Trace:
    """The trace of an engine with this bug; None: without any bug. The trace claims the calls `runs`."""
    recorder = Recorder()
    if mutant is None:
        model, made, used = Model(config, parameters, CUT_STEPS), runs, policy
    else:
        model, made, used = mutant.model(config, parameters), mutant.runs(runs), mutant.policy(policy)
    with np.errstate(all="ignore"):
        execute(PolicyOps(used, recorder), model, made, recorder)
    name = "specification" if mutant is None else mutant.id
    return held_trace(
        Header(runs=runs, case=None, checkpoint=None, policy=policy.name, producer={"name": name}),
        recorder.arrays,
        name,
    )


def same(one: Trace, other: Trace) -> bool:
    """Whether two traces in memory hold the same values. Their dtypes may differ."""

    def bits(tensor: Any) -> bytes:
        return np.asarray(tensor.map(), np.float64).tobytes()

    return one.tensors.keys() == other.tensors.keys() and all(
        bits(tensor) == bits(other.tensors[key]) for key, tensor in one.tensors.items()
    )
