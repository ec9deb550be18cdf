# SPDX-License-Identifier: Apache-2.0
"""Mutants, and the register of all of them.

A mutant is one known bug as a variation of the specification. A few lines replace a step of the model, a constant, a
mapping of weights, a rule of the cache or a cut point of the policy. The interface stays, so that a mutant runs
under every `ops`: as a foreign engine (policy ops), and as a hypothesis about an engine (enclosures).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Required, TypedDict, TypeVar, Unpack

from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run

Function = TypeVar("Function", bound=Callable[..., Any])

STEP, CONFIG, PARAMETERS, POLICY, CALLS = "step", "config", "parameters", "policy", "calls"
"""The parts of a forward pass that a mutant may change."""
TOKENIZER, SAMPLER, LOSS, PARALLEL = "tokenizer", "sampler", "loss", "parallel"
OUTSIDE = (TOKENIZER, SAMPLER, LOSS, PARALLEL)
"""The parts outside a single forward pass. They are judged by vectors, or by the simulated parallel run."""

SHAPES = re.compile(r"(-> |\b\w+(, \w+)*: ([\w./]+ ){0,3}?)\[.*")
"""The shapes at the end of a docstring, such as ``x: [T, D]   returns: [T, S]``."""


@dataclass(frozen=True)
class Mutant:
    """One known bug."""

    id: str
    about: str
    """The wrong behaviour and its cause: the prose of the docstring of `function`."""
    kind: str
    """``attention``, ``router``, ...: its file in the catalogue."""
    function: Callable[..., Any]
    """The replacement, by `changes`.

    `STEP`: a step of the model   `CONFIG`: maps the config   `PARAMETERS`: (config, parameters) to parameters
    `POLICY`: maps the policy   `CALLS`: maps the runs   `PARALLEL`: (config, parameters, layout) to a `Model`
    """
    breaks: tuple[str, ...] = ()
    """The ids of the clauses that it breaks."""
    touches: tuple[str, ...] = ()
    """The taps, without their layer, that it can make wrong from right inputs."""
    needs: tuple[str, ...] = ()
    """The conditions, of `refmoe.suite.conditions`, that must all hold. Otherwise the mutant changes nothing."""
    sources: tuple[str, ...] = ()
    """URLs of the engines that had this bug."""
    severity: str = "high"
    changes: str = STEP
    steps: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """All steps of the model that it replaces, by name."""
    fix: str = ""
    """Advice in one sentence: the place to look at, or the change to make."""
    equivalent: str = ""
    """The reason why no legal run shows the bug; empty if some run does."""
    judged_by: str = ""
    """Changes to the policy, such as ``+ties=lower``, that state the rule it breaks. Generic policies do not."""
    unseen: Mapping[str, str] = field(default_factory=dict)
    """The policies under which no verification can see it, each with the reason."""
    by_size: bool = False
    """Whether only the size of its effect is known: it draws at random, or its order of roundings is the engine's."""

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
"""All mutants by id, in the order of the catalogue. `refmoe.bugs.catalogue` fills it."""


class Facts(TypedDict, total=False):
    """The facts about a mutant that its entry in the catalogue states: fields of `Mutant`, and `step`.

    A fact that equals the default of its field is left out.
    """

    breaks: Required[Sequence[str]]
    touches: Required[Sequence[str]]
    fix: Required[str]
    needs: Sequence[str]
    sources: Sequence[str]
    severity: str
    changes: str
    step: str
    """For `STEP`: the name of the step; by default the name of the function."""
    steps: Mapping[str, Callable[..., Any]]
    """Further steps that the mutant replaces."""
    equivalent: str
    judged_by: str
    unseen: Mapping[str, str]
    by_size: bool


def mutant(id: str, **facts: Unpack[Facts]) -> Callable[[Function], Function]:
    """Register the decorated function as a mutant. Raises ValueError when the id is taken."""

    def register(function: Function) -> Function:
        if id in MUTANTS:
            raise ValueError(f"two mutants have the id {id}")
        stated: dict[str, Any] = {**facts}
        step = stated.pop("step", function.__name__)
        steps = dict(stated.pop("steps", {}))
        if stated.get("changes", STEP) == STEP:
            steps[step] = function
        stated = {name: tuple(value) if isinstance(value, list) else value for name, value in stated.items()}
        kind = function.__module__.rpartition(".")[2]
        about = prose_of(function.__doc__ or "")
        MUTANTS[id] = Mutant(id=id, about=about, kind=kind, function=function, steps=steps, **stated)
        return function

    return register


def prose_of(docstring: str) -> str:
    """The sentences of a docstring in one line, without the shapes of arguments and results at its end."""
    return SHAPES.sub("", " ".join(docstring.split())).rstrip()
