# SPDX-License-Identifier: Apache-2.0
"""Legal variants, and the register of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.spec.taps import step_of
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.held import held_trace
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder, Run, Trace


class Engine(NamedTuple):
    """A variant at work: a model, the calls that it really makes, its policy, and its arithmetic."""

    model: Model
    runs: tuple[Run, ...]
    policy: Policy
    ops: Callable[..., PolicyOps] = PolicyOps


Function = Callable[[Config, Parameters, tuple[Run, ...], Policy], Engine]


@dataclass(frozen=True)
class Variant:
    """One legal variant."""

    id: str
    about: str
    leaves_out: tuple[str, ...]
    """Taps, without their layer, that such an engine has no value for."""
    function: Function

    def run(self, config: Config, parameters: Parameters, runs: tuple[Run, ...], policy: Policy) -> Trace:
        """The trace of an engine with this variant. The trace claims the calls `runs`."""
        engine = self.function(config, parameters, runs, policy)
        recorder = Recorder()
        with np.errstate(all="ignore"):
            execute(engine.ops(engine.policy, recorder), engine.model, engine.runs, recorder)
        arrays = in_calls(recorder.arrays, engine.runs, runs)
        kept = {key: array for key, array in arrays.items() if step_of(key.partition("/")[2]) not in self.leaves_out}
        return held_trace(
            Header(runs=runs, case=None, checkpoint=None, policy=policy.name, producer={"name": self.id}), kept, self.id
        )


LEGAL: dict[str, Variant] = {}
"""All legal variants by id."""


def legal(id: str, leaves_out: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Register the decorated function as a legal variant."""

    def register(function: Function) -> Function:
        about = " ".join((function.__doc__ or "").split())
        LEGAL[id] = Variant(id=id, about=about, leaves_out=tuple(leaves_out), function=function)
        return function

    return register


def with_steps(config: Config, parameters: Parameters, **steps: Any) -> Model:
    """The specification with some steps replaced."""
    return Model(config, parameters, replace(CUT_STEPS, **steps))


def in_calls(arrays: dict[str, Any], made: Sequence[Run], claimed: Sequence[Run]) -> dict[str, Any]:
    """The arrays of the calls that were made, cut to the new tokens of the calls that are claimed."""
    found = {}
    for key, array in arrays.items():
        run, _, tap = key.partition("/")
        mine, its = (next(each for each in runs if each.run == run) for runs in (made, claimed))
        first = len(mine.tokens) - len(its.tokens)
        tokens_first = step_of(tap) not in ("attention.scores", "attention.probs")
        found[key] = array[first:] if tokens_first else array[:, first:]
    return found
