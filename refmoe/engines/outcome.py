"""What conformance finds: an outcome for each case and dtype, and the results of an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.verify.findings import CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT

SKIPPED = "skipped"
VERDICTS = (CONFORMANT, NOT_CONFORMANT, CANNOT_JUDGE, SKIPPED, CRASHED, TIMED_OUT, BROKEN)
"""Of a case at a dtype; PROTOCOL.md says what each means."""
GOOD = (CONFORMANT, SKIPPED)
"""The verdicts that are no failure."""


@dataclass(frozen=True)
class Cause:
    """What explains a failure: the part of a `refmoe.verify.findings.Explanation` that is kept."""

    name: str
    kind: str
    about: str
    fix: str
    sources: tuple[str, ...]
    """URLs."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case at one dtype."""

    case: str
    dtype: str
    policy: str
    """By which rounding was judged."""
    verdict: str
    reason: str
    """One sentence, the same each time for the same engine."""
    issue: str | None = None
    """A URL, where a case was skipped because of an issue."""
    first_wrong: tuple[str, str] | None = None
    """Run and tap of the first wrong step."""
    worst_errors: Mapping[str, float] = field(default_factory=dict)
    """Per step, tap without layer, the largest error in units of the allowed one: above 1 is impossible."""
    explanations: tuple[Cause, ...] = ()
    """What explains a failure, the best first."""

    @property
    def failed(self) -> bool:
        return self.verdict not in GOOD


@dataclass(frozen=True)
class Engine:
    """What was run."""

    name: str
    version: str
    options: Mapping[str, str]
    """Those of the adapter; of a harness that is a program its `command`."""


@dataclass(frozen=True)
class Results:
    """All outcomes of an engine. No date, so that the same engine gives the same file."""

    engine: Engine
    platform: Mapping[str, str]
    """`system`, `machine`."""
    refmoe: str
    """Version of refmoe."""
    significance: float
    """The probability that a healthy engine fails at a case and dtype."""
    cases: Mapping[str, str]
    """Per case the SHA-256 of its case.toml."""
    smoke: str
    """What the smoke test ran, in words."""
    outcomes: tuple[Outcome, ...]
    """In order of cases, then dtypes."""
    notes: tuple[str, ...] = ()
    """What was odd and is no outcome, such as a harness that does not stop."""

    @property
    def counts(self) -> Counter[str]:
        """Outcomes per verdict."""
        return Counter(each.verdict for each in self.outcomes)
