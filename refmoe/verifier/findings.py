# SPDX-License-Identifier: Apache-2.0
"""The findings of a verification: checks of values, routing decisions, explanations, and the verdict over all."""

from __future__ import annotations

from dataclasses import dataclass

from refmoe.spec.taps import layer_of, step_of

PASS, FAIL, UNDECIDABLE = "pass", "fail", "undecidable"
"""The three verdicts of a check."""

CONFORMANT, NOT_CONFORMANT, CANNOT_JUDGE = "conformant", "not conformant", "cannot judge"
"""The three verdicts of a verification; exit status 0, 1 and 2."""

LOCAL, REPLAYED, FREE = "local", "routing-replayed", "free-running"
"""The rungs: how a tap was recomputed.

local: every input of the step is in the trace.
routing-replayed: all steps since the last taps of the trace are recomputed, with the trace's own choice of experts.
free-running: refmoe had to choose the experts itself.
"""

FORCED, TIE, CONTESTABLE = "forced", "tie", "contestable"
"""The kinds of routing decision.

forced: no rounding that the policy allows can change the choice.
tie: the last chosen and the best refused logit are equal in exact arithmetic.
contestable: rounding alone can decide either way.
"""


@dataclass(frozen=True)
class Element:
    """The worst element of a check. A reader should look at it first."""

    where: tuple[int, ...]
    """Its index in the tap. The token comes first, except in scores and probs, which are [H, T, S]."""
    found: float
    expected: float
    """The midpoint of the enclosure: the result of exact arithmetic."""
    low: float
    high: float
    """The ends of the legal interval: the smallest and largest value that the policy can produce, or infinities."""
    sigma: float
    """Standard deviation of legal results before their last rounding; NaN where it is not known."""
    expert: int | None = None
    """The expert of its slot; None for taps without slots."""


@dataclass(frozen=True)
class Check:
    """The test of one tap of one run against the enclosure that the policy gives."""

    run: str
    tap: str
    since: tuple[str, ...]
    """The taps of the trace that the enclosure was computed from."""
    rung: str
    verdict: str
    reason: str
    """In words: the test that failed and by how much, or the information that is missing to decide."""
    values: int = 0
    """The number of elements tested."""
    undecided: int = 0
    """The number of elements with neither a finite radius nor a finite variance."""
    outside: int = 0
    """The number of elements outside the legal interval. Such values are impossible under the policy."""
    worst_error: float = 0.0
    """The largest error over the allowed error (radius and last rounding). Above 1 is impossible."""
    excess: float = 0.0
    """The largest distance from the midpoint to the cell of the value found, in standard deviations."""
    excess_limit: float = 0.0
    rms: float = 0.0
    """Root mean square of error over standard deviation."""
    rms_limit: float = float("nan")
    """NaN where there are too few errors for this test, or errors that are not independent enough."""
    truncation: float = 0.0
    """The coefficient of the matched filter against truncation: 0 rounded to nearest, 1 truncated."""
    truncation_snr: float = 0.0
    worst: Element | None = None

    @property
    def layer(self) -> int | None:
        """The number of the layer; None for taps outside the layers."""
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
    """The distance between the midpoints of the last chosen and the best refused logit."""
    movable: float
    """The most that rounding under the policy can change the margin."""


@dataclass(frozen=True)
class ContestableCode:
    """A code of a product's input that rounding alone decides, between two codes. Either is legal."""

    run: str
    tap: str
    """The input that the code is made of."""
    where: tuple[int, ...]
    """Its index in that tap."""
    product: str
    """The last tap whose values were asked which of the two codes the engine has."""
    format: str
    """The name of the codes."""
    ideal: float
    """The real number that is rounded to the code: the input over its scale."""
    rule: float
    """The code that the policy's own rule gives."""
    other: float
    """The code on the other side of the boundary."""
    found: float | None
    """The engine's code; None where the products that read it leave it open."""

    @property
    def deviates(self) -> bool:
        """Whether the engine has the code on the other side."""
        return self.found is not None and self.found != self.rule


KNOWN_BUG, TWO_BUGS, STRUCTURE = "known bug", "two known bugs", "structure"
ARITHMETIC, BUG_AND_ARITHMETIC = "other arithmetic", "known bug and other arithmetic"
"""The kinds of explanation.

structure: the right values in another order or place, or times a factor.
other arithmetic: the declared policy with a change.
"""


@dataclass(frozen=True)
class Explanation:
    """A possible cause of the failed checks, and how well it explains them."""

    name: str
    """The id of the bug, the ids of both bugs, or the structure in words."""
    kind: str
    about: str
    fix: str
    sources: tuple[str, ...]
    """URLs."""
    explains: bool
    """Whether every failed check passes under the explanation, and every passed check still passes.

    For a structure only the failed checks of its step count.
    """
    still_failing: int
    newly_failing: int
    coefficient: float
    """The coefficient of the matched filter: 1 if the cause predicts the error, 0 if unrelated, NaN if unknown."""
    residual: float
    """The part of the error that the cause does not predict: its root mean square over that of the whole error."""
    touches: int = 0
    """The number of taps that the cause can make wrong. Of two that explain equally well, fewer taps come first."""
    values: int = 0
    """The number of wrong values that it accounts for. A wrong choice of experts counts as one value."""
    where: str = ""
    """The calls, layers or rows that the cause is limited to, in words; empty: everywhere that it could act."""
    rivals: tuple[str, ...] = ()
    """The names of other explanations that leave as little. At most one of them and this one is right."""
    told_apart_by: str = ""
    """The first tap in which this explanation and the best rival differ. The trace lacks it; empty: no tap shows it."""
    by_size: bool = False
    """Whether it predicts only the size of the errors, and not their values.

    Then the coefficient is the size found over that predicted. The residual grows with its distance from the likeliest.
    """


def proven(
    name: str,
    kind: str,
    about: str,
    fix: str,
    coefficient: float = float("nan"),
    residual: float = float("nan"),
    values: int = 0,
    where: str = "",
) -> Explanation:
    """An explanation without sources, under which no check fails."""
    return Explanation(
        name=name,
        kind=kind,
        about=about,
        fix=fix,
        sources=(),
        explains=True,
        still_failing=0,
        newly_failing=0,
        coefficient=coefficient,
        residual=residual,
        values=values,
        where=where,
    )


ALL_TAPS = "all taps"
"""The set of all taps, as `Power` names it."""


@dataclass(frozen=True)
class Power:
    """The known bugs that a verification with these taps would see, as measured on golden cases."""

    taps: str
    """The largest measured set of taps that the trace holds; empty if it holds none of them."""
    dtype: str
    """The dtype at which the set was measured, under the policy of that name."""
    seen: int
    """The number of known bugs that are seen with this set."""
    known: int
    """The number of known bugs that were tried."""
    unseen: tuple[str, ...]
    """The ids of the known bugs that are not seen with this set."""

    @property
    def weak(self) -> bool:
        """Whether more known bugs would escape than be seen. So it is too where the set of taps was not measured."""
        return 2 * self.seen < self.known


@dataclass(frozen=True)
class Report:
    """All findings about a trace."""

    trace: str
    subject: str
    """The case or checkpoint that the trace is held against, such as ``case walking-skeleton``."""
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
    """Every decision that the trace shows, or that the verifier needed, in order of computation."""
    codes: tuple[ContestableCode, ...] = ()
    """The codes of inputs that rounding alone decides, in order of computation.

    The codes of a row with more than four of them are not here: what they can change is part of the interval.
    """
    first_wrong: tuple[str, str] | None = None
    """Run and tap of the first wrong step, in order of computation."""
    missing: tuple[str, ...] = ()
    """Taps of the specification that the trace lacks in every run and layer, without their layer."""
    unknown: tuple[str, ...] = ()
    """Keys of the trace that name no tap."""
    notes: tuple[str, ...] = ()
    """The limits of this verification and the taps that would lift them; one sentence each."""
    power: Power | None = None
    """None: not looked up."""
    explanations: tuple[Explanation, ...] | None = None
    """The explanations, best first. Empty: nothing known explains the failure. None: no diagnosis was made."""

    def check(self, run: str, tap: str) -> Check | None:
        """The check of one tap of one run; None if there is none."""
        return next((check for check in self.checks if (check.run, check.tap) == (run, tap)), None)


def as_set(experts: tuple[int, ...]) -> str:
    """A choice of experts in words, such as ``{2, 5}``, in the order given."""
    return "{" + ", ".join(map(str, experts)) + "}"
