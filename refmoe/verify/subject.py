"""What a trace is held against, and what holding it against that has shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from refmoe.spec.config import Config
from refmoe.spec.model import Parameters, Steps
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS, step_of
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.traces.trace import Run
from refmoe.verify.findings import Decision
from refmoe.verify.tally import Tally


@dataclass(frozen=True)
class Subject:
    """What a trace is held against."""

    config: Config
    parameters: Parameters
    runs: tuple[Run, ...]
    steps: Steps = CUT_STEPS
    """Those of the specification, or of a known bug that the trace may have."""
    ops: Callable[..., EnclosureOps] = EnclosureOps
    """Made of a policy and a tap; the same everywhere but for the place where products are computed."""


@dataclass
class Findings:
    """What a pass has seen."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    counts: dict[tuple[str, bool], int] = field(default_factory=dict)
    """How many decisions there are of each kind, legal and illegal."""
    invalid: dict[tuple[str, str], str] = field(default_factory=dict)
    """Expert ids that are no choice at all, in words."""
    open_choices: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """Per router tap that is not in the trace: tokens whose experts rounding alone can decide."""
    unbounded: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    """Per tap of the trace: tokens of which nothing is known, because rounding decided a choice before them."""


def shape_of(tap: str, config: Config, run: Run) -> tuple[int, ...]:
    """The shape of a tap in a run."""
    sizes = {
        "T": len(run.tokens), "S": run.past + len(run.tokens), "D": config.dim, "H": config.heads,
        "K": config.kv_heads, "d": config.head_dim, "E": config.experts, "k": config.experts_per_token,
        "F": config.hidden_dim, "V": config.vocab,
    }  # fmt: skip
    dimensions = MODEL_TAPS[tap] if tap in MODEL_TAPS else LAYER_TAPS[step_of(tap)]
    return tuple(sizes[name] for name in dimensions.split())
