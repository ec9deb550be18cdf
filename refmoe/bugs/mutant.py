"""What a mutant is, and the register of all of them.

A mutant is a few lines that replace one step of the model, one constant, one mapping of weights, one rule of the cache
or one cut point of the policy. It keeps the interface of what it replaces, so that it runs under every `ops`: as a
foreign engine (policy ops), and as a hypothesis about one (enclosures).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from refmoe.policy.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run

Function = TypeVar("Function", bound=Callable[..., Any])

STEP, CONFIG, PARAMETERS, POLICY, CALLS = "step", "config", "parameters", "policy", "calls"
"""What a mutant of the forward pass may change."""
TOKENIZER, SAMPLER, LOSS, PARALLEL = "tokenizer", "sampler", "loss", "parallel"
OUTSIDE = (TOKENIZER, SAMPLER, LOSS, PARALLEL)
"""What lies outside of one forward pass: judged by vectors, or by the simulated parallel run."""


@dataclass(frozen=True)
class Mutant:
    """One known bug."""

    id: str
    about: str
    """What it does and how it comes about; the docstring of its function."""
    kind: str
    """``attention``, ``router``, ...: the file of the catalogue that it is in."""
    breaks: tuple[str, ...]
    """Clause ids."""
    needs: tuple[str, ...]
    """Conditions without which it changes nothing, names of `refmoe.suite.conditions`; all must hold."""
    sources: tuple[str, ...]
    """Where it was met: URLs."""
    severity: str
    changes: str
    """One of the constants above, or of `OUTSIDE`."""
    function: Callable[..., Any]
    steps: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """For `STEP`: the steps that it replaces."""
    touches: tuple[str, ...] = ()
    """Taps, without their layer, that it can make wrong from right inputs."""
    fix: str = ""
    """What to look at, in a sentence."""
    equivalent: str = ""
    """Why no legal run shows it, where none does."""
    judged_by: str = ""
    """Changes to the policy that state the rule it breaks, such as ``+ties=lower``, where the generic ones do not."""
    unseen: Mapping[str, str] = field(default_factory=dict)
    """Policies under which no verification can see it, each with the reason: its effect against what is legal."""

    @property
    def in_one_pass(self) -> bool:
        """Whether it is a variation of one forward pass."""
        return self.changes not in OUTSIDE and not self.equivalent

    def model(self, config: Config, parameters: Parameters) -> Model:
        """The model of an engine that has this bug."""
        if self.changes == CONFIG:
            config = self.function(config)
        elif self.changes == PARAMETERS:
            parameters = self.function(config, parameters)
        return Model(config, parameters, replace(CUT_STEPS, **self.steps))

    def policy(self, policy: Policy) -> Policy:
        """The policy of an engine that has this bug."""
        changed: Policy = self.function(policy) if self.changes == POLICY else policy
        return changed

    def runs(self, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        """The calls as an engine that has this bug makes them."""
        changed: tuple[Run, ...] = tuple(self.function(runs)) if self.changes == CALLS else runs
        return changed


MUTANTS: dict[str, Mutant] = {}
"""All mutants by id, in the order of the catalogue; `refmoe.bugs.catalogue` fills it."""


def mutant(
    id: str, breaks: Sequence[str], touches: Sequence[str], needs: Sequence[str] = (), sources: Sequence[str] = (),
    severity: str = "high", changes: str = STEP, step: str | None = None, fix: str = "", equivalent: str = "",
    judged_by: str = "", steps: Mapping[str, Callable[..., Any]] | None = None,
    unseen: Mapping[str, str] | None = None,
) -> Callable[[Function], Function]:  # fmt: skip
    """Register the decorated function as a mutant.

    changes: what the function replaces. `STEP`: the step of the function's own name, or of `step`. `CONFIG`: it maps
    the configuration; `PARAMETERS`: (config, parameters) to parameters; `POLICY`: the policy; `CALLS`: the runs.
    steps: for `CALLS`, steps that it replaces as well, which see what the calls were changed to.
    """

    def register(function: Function) -> Function:
        if id in MUTANTS:
            raise ValueError(f"two mutants have the id {id}")
        replaced = {step or function.__name__: function} if changes == STEP else dict(steps or {})
        kind = function.__module__.rpartition(".")[2]
        MUTANTS[id] = Mutant(
            id, " ".join((function.__doc__ or "").split()), kind, tuple(breaks), tuple(needs), tuple(sources), severity,
            changes, function, replaced, tuple(touches), fix, equivalent, judged_by,
            unseen or {},
        )  # fmt: skip
        return function

    return register
