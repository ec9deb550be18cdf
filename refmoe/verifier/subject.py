# SPDX-License-Identifier: Apache-2.0
"""The subject that a trace is held against, and the findings of one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from refmoe.arithmetic.arrays import Tap
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters, Steps
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS, READ_OUT_TAPS, step_of
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run
from refmoe.verifier.findings import ContestableCode, Decision
from refmoe.verifier.ranking import Ranking
from refmoe.verifier.tally import Tally


@dataclass(frozen=True)
class Subject:
    """The model and runs that a trace is held against."""

    config: Config
    parameters: Parameters
    runs: tuple[Run, ...]
    steps: Steps = CUT_STEPS
    """The steps of the specification, or of a known bug that the trace may have."""
    ops: Callable[..., EnclosureOps] = EnclosureOps
    """Called with a policy and a tap. Products may be computed on another device, with the same results."""


def with_shared_weights(make: Callable[..., EnclosureOps]) -> Callable[..., EnclosureOps]:
    """Ops as `make` makes them, all of which keep prepared weights in one place. All calls have the same policy.

    A verification makes many passes. Each would prepare every weight again, and keep it until it is collected.
    """
    keeper: list[EnclosureOps] = []

    def ops(policy: Policy, tap: Tap | None) -> EnclosureOps:
        if not keeper:
            keeper.append(make(policy, None))
        made = make(policy, tap)
        made.share_weights(keeper[0])
        return made

    return ops


@dataclass
class Findings:
    """The tallies and decisions of a pass."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    codes: dict[tuple[Any, ...], ContestableCode] = field(default_factory=dict)
    """The codes that rounding alone decides, by their place. A later product that reads a code says more about it."""
    counts: dict[tuple[str, bool], int] = field(default_factory=dict)
    """The number of decisions per kind and legality."""
    invalid: dict[tuple[str, str], str] = field(default_factory=dict)
    """Per router tap, in words: ids that are out of range or repeated, and so no choice of experts."""
    rankings: dict[tuple[str, str], Ranking] = field(default_factory=dict)
    """The choices of the listed log-probabilities."""
    open_choices: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """Per router tap that the trace lacks: the tokens whose experts rounding alone can decide."""
    unbounded: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """Per tap of the trace: the tokens without any bound, because rounding decided a choice in an earlier step."""


DIMENSIONS = {step: names.split() for step, names in (MODEL_TAPS | READ_OUT_TAPS | LAYER_TAPS).items()}


def sizes_of(config: Config, run: Run, entries: int | None = None) -> dict[str, int]:
    """The length of each axis of the taps of a run.   entries: as in `shape_of`"""
    return {
        "T": len(run.tokens), "S": run.past + len(run.tokens), "D": config.dim, "H": config.heads,
        "K": config.kv_heads, "d": config.head_dim, "E": config.experts, "k": config.experts_per_token,
        "F": config.hidden_dim, "V": config.vocab, "n": config.vocab if entries is None else entries,
    }  # fmt: skip


def shape_of(tap: str, config: Config, run: Run, entries: int | None = None) -> tuple[int, ...]:
    """The shape of a tap in a run.   entries: the listed log-probabilities of each token; None: the whole vocabulary"""
    sizes = sizes_of(config, run, entries)
    return tuple(sizes[axis] for axis in DIMENSIONS[step_of(tap)])
