"""What a verification finds: checks of values, routing decisions, and the verdict over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from refmoe.spec.taps import layer_of, step_of

PASS, FAIL, UNDECIDABLE = "pass", "fail", "undecidable"
"""The three verdicts of a check."""

CONFORMANT, NOT_CONFORMANT, CANNOT_JUDGE = "conformant", "not conformant", "cannot judge"
"""The three verdicts of a verification; exit status 0, 1 and 2."""

LOCAL, REPLAYED, FREE = "local", "routing-replayed", "free-running"
"""The rungs. local: every input of the step is in the trace. routing-replayed: values since the last tap are
recomputed, with the trace's own choice of experts. free-running: refmoe had to choose experts itself."""

FORCED, TIE, CONTESTABLE = "forced", "tie", "contestable"
"""The kinds of routing decision. forced: the policy's arithmetic cannot change it. tie: equal in exact arithmetic.
contestable: rounding alone can decide either way."""


@dataclass(frozen=True)
class Element:
    """The worst element of a check, to look at first."""

    where: tuple[int, ...]
    """Its index in the tap: the token first, but for scores and probs [H, T, S]."""
    found: float
    expected: float
    """The midpoint of what is legal."""
    low: float
    high: float
    """The smallest and the largest value that the policy can produce; infinite where nothing is known."""
    sigma: float
    """Standard deviation of what legal implementations give before the last rounding; NaN where not known."""
    expert: int | None = None
    """The expert behind its slot, where it has one."""


@dataclass(frozen=True)
class Check:
    """One tap of one run, held against what the policy allows."""

    run: str
    tap: str
    since: tuple[str, ...]
    """The taps of the trace that it was computed from: one step where they are its inputs, else a segment."""
    rung: str
    verdict: str
    reason: str
    """In words: which test failed and by how much, or what is missing to decide."""
    values: int = 0
    """How many elements were tested."""
    undecided: int = 0
    """How many elements have no finite bound of either kind."""
    outside: int = 0
    """How many lie outside the hard interval: impossible under the policy."""
    worst_error: float = 0.0
    """Largest distance from the midpoint over the allowed one (radius and last rounding); above 1 is impossible."""
    excess: float = 0.0
    """Largest distance from the midpoint to the cell of the value found, in standard deviations."""
    excess_limit: float = 0.0
    rms: float = 0.0
    """Root mean square of error over standard deviation."""
    rms_limit: float = float("nan")
    """NaN where errors are not independent enough, or too few, for this test."""
    truncation: float = 0.0
    """The matched filter against truncation: 0 rounded to nearest, 1 truncated."""
    truncation_snr: float = 0.0
    worst: Element | None = None

    @property
    def layer(self) -> int | None:
        """The layer, or None outside of the layers."""
        return layer_of(self.tap)

    @property
    def step(self) -> str:
        """The tap's name without its layer."""
        return step_of(self.tap)


@dataclass(frozen=True)
class Decision:
    """The experts of one token in one layer."""

    run: str
    layer: int
    token: int
    kind: str
    legal: bool
    found: tuple[int, ...]
    """The trace's choice, in the order of its slots; empty where the trace has none."""
    expected: tuple[int, ...]
    """The choice of exact arithmetic from the same inputs."""
    margin: float
    """How far the midpoints of the last chosen and the best refused logit lie apart."""
    movable: float
    """How far the policy's rounding can move that difference."""


KNOWN_BUG, TWO_BUGS, STRUCTURE = "known bug", "two known bugs", "structure"
"""What an explanation is. structure: the right values elsewhere, or times a factor."""


@dataclass(frozen=True)
class Explanation:
    """How well something explains what failed."""

    name: str
    """Id of the bug, ids of both, or the structure in words."""
    kind: str
    about: str
    fix: str
    sources: tuple[str, ...]
    """URLs."""
    explains: bool
    """Whether all that failed passes under it, and all that passed still does; for a structure, all of its step."""
    still_failing: int
    newly_failing: int
    coefficient: float
    """Of the matched filter: 1 where the error is this one, 0 where it has nothing to do with it; NaN where unknown."""
    residual: float
    """What it leaves of the error, root mean square over that of the whole error."""
    touches: int = 0
    """How many taps it can make wrong: of two that explain alike, the one that touches fewer says more."""


@dataclass(frozen=True)
class Report:
    """All findings about a trace."""

    trace: str
    subject: str
    """The case or checkpoint that it is held against, such as ``case walking-skeleton``."""
    producer: str
    policy: str
    significance: float
    """The probability that a healthy engine fails somewhere in the whole verification."""
    verdict: str
    headline: str
    """The verdict in one sentence, with the reason."""
    checks: tuple[Check, ...] = ()
    """In order of computation, run by run."""
    decisions: tuple[Decision, ...] = ()
    """Every decision that the trace shows or that was needed, in order of computation."""
    first_wrong: tuple[str, str] | None = None
    """Run and tap of the first wrong step, in order of computation."""
    missing: tuple[str, ...] = ()
    """Taps of the specification that the trace lacks in every run and layer, without their layer."""
    unknown: tuple[str, ...] = ()
    """Keys of the trace that name no tap."""
    notes: tuple[str, ...] = ()
    """What could not be said and what would have to be in the trace to say it; one sentence each."""
    explanations: tuple[Explanation, ...] | None = None
    """What explains the failure, the best first, empty where nothing known does; None where nobody has looked."""

    def check(self, run: str, tap: str) -> Check | None:
        """The check of one tap of one run."""
        return next((check for check in self.checks if (check.run, check.tap) == (run, tap)), None)


def as_set(experts: tuple[int, ...]) -> str:
    """A choice of experts as a set, in the order given."""
    return "{" + ", ".join(map(str, experts)) + "}"
