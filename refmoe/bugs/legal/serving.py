# SPDX-License-Identifier: Apache-2.0
"""Legal ways to serve: other calls, and many devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from refmoe.arithmetic.formats import nearest
from refmoe.bugs.legal.variant import Engine, legal, with_steps
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.sharded import layouts, shard
from refmoe.traces.trace import Run


@legal("no-cache")
def no_cache(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """Every call computes its sequence from the start, without a cache (MODEL-4)."""
    made, tokens, positions = [], {}, {}  # type: tuple[list[Run], dict[int, Any], dict[int, Any]]
    for run in runs:
        tokens[run.sequence] = tokens.get(run.sequence, ())[: run.past] + run.tokens
        positions[run.sequence] = positions.get(run.sequence, ())[: run.past] + run.positions
        made.append(replace(run, tokens=tokens[run.sequence], positions=positions[run.sequence], past=0))
    return Engine(with_steps(config, parameters), tuple(made), policy)


@legal("many-devices")
def many_devices(config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Engine:
    """The model is spread over as many devices as it fits (SHARD-1). The ranks' parts of a sum are rounded to the dtype
    of accumulation before they are added."""

    class RoundedParts(PolicyOps):
        def linear(self, x: Any, weight: Any) -> Any:
            return nearest(super().linear(x, weight), policy.accumulation)

    return Engine(shard(config, parameters, [*layouts(config)][-1]), runs, policy, RoundedParts)
