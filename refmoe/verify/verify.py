"""Verify a trace: checks, routing decisions, the first wrong step and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from refmoe.policy.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.spec.taps import layer_of, step_of, tap_names
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.traces.trace import Run, Trace
from refmoe.verify.findings import (
    CANNOT_JUDGE,
    CONFORMANT,
    FAIL,
    FREE,
    LOCAL,
    NOT_CONFORMANT,
    PASS,
    UNDECIDABLE,
    Check,
    Decision,
    Report,
    as_set,
)
from refmoe.verify.free_running import against_noise
from refmoe.verify.intake import Contents, take_in
from refmoe.verify.provenance import MIXING, Origin, origins
from refmoe.verify.segments import Spread, judge_all
from refmoe.verify.subject import Findings, Subject
from refmoe.verify.tally import LIKE_POINTWISE, Limits, Tally

OPEN_CHOICE = "rounding can decide the choice of experts"
NO_BOUND = "it may overflow, or rounding adds up over too many steps"
"""Why a value may be undecided."""

Judged = tuple[Findings, list[Check]]

SIGNIFICANCE = 1e-6
"""A healthy engine fails a whole verification less than once in this many."""


def verify(
    trace: Trace, name: str, config: Config, parameters: Parameters, runs: tuple[Run, ...] | None, policy: Policy,
    significance: float = SIGNIFICANCE, progress: Callable[[], None] | None = None,
    ops: Callable[..., EnclosureOps] = EnclosureOps, spread: Spread | None = None,
) -> Report:  # fmt: skip
    """Judge a trace.

    name: what it is held against, in words.   runs: those of the case, or None to take the trace's own.
    progress: called after each layer of each run.   ops: as of a `Subject`.
    spread: where layers are judged side by side; None: one after the other, here.
    Raises InputError when the trace cannot be held against it.
    """
    contents = take_in(trace, config, runs)
    subject = Subject(config, parameters, contents.runs, ops=ops)
    limits = Limits(significance, contents.values, contents.tensors)

    def judge(recomputed: frozenset[tuple[str, str]] = frozenset(), unrounded: bool = False) -> Judged:
        findings = judge_all(
            trace, subject, policy, limits.excess, contents.present, recomputed, unrounded, progress, spread
        )
        checks = assemble(findings, contents, config, policy, limits)
        return findings, against_noise(checks, findings, trace, subject, policy, limits)

    findings, checks = judge()
    failed = frozenset((check.run, check.tap) for check in checks if check.verdict == FAIL)
    if failed:
        # a tap may be wrong while what follows is right: then its consumers pass on what they should have read
        _, again = judge(recomputed=failed)
        checks = acquit(checks, again, "the trace's value of its input is wrong, but was not what this step read")
    if policy.consumers == "unrounded" and any(check.verdict == FAIL for check in checks):
        _, again = judge(unrounded=True)
        checks = acquit(checks, again, "this step read its input before it was stored")
    return conclude(trace, name, policy, significance, contents, findings, checks)


def assemble(findings: Findings, contents: Contents, config: Config, policy: Policy, limits: Limits) -> list[Check]:
    """The checks of a pass, in order of computation, run by run."""
    checks = []
    chosen = {(d.run, d.layer, d.token): d.found or d.expected for d in findings.decisions}
    decisions: dict[tuple[str, int | None], list[Decision]] = {}
    for decision in findings.decisions:
        decisions.setdefault((decision.run, decision.layer), []).append(decision)
    for run in contents.runs:
        present = contents.present[run.run]
        alike = max(Counter(run.tokens).values())
        came_from = origins(config, present)
        for tap in tap_names(config):
            if tap not in present:
                continue
            origin = came_from[tap]
            if step_of(tap) == "router.experts":
                mine = decisions.get((run.run, layer_of(tap)), [])
                checks.append(_routing_check(mine, findings.invalid.get((run.run, tap)), run.run, tap, origin))
                continue
            tally = findings.tallies.get((run.run, tap), Tally())
            size = alike_values(tap, origin, alike)
            # the rows of a norm in the dtype of its statistic: adding eps to rounded means errs alike in all of them
            alike_rows = origin.normalises and policy.statistics.precision <= policy.at(step_of(tap)).precision
            if size is not None and alike_rows:
                size = max(size, tally.values / max(tally.rows, 1))
            why = OPEN_CHOICE if origin.rung == FREE else NO_BOUND
            check = tally.check(run.run, tap, origin.since, origin.rung, limits, size, not alike_rows, why)
            checks.append(name_expert(check, chosen))
    return checks


def name_expert(check: Check, chosen: dict[tuple[str, int, int], tuple[int, ...]]) -> Check:
    """The check, with the expert behind the slot of its worst element. chosen: per run, layer and token the experts"""
    if check.worst is None or check.layer is None or not check.step.startswith(("expert.", "router.weights")):
        return check
    token, slot, *_ = check.worst.where
    experts = chosen.get((check.run, check.layer, token), ())
    return replace(check, worst=replace(check.worst, expert=experts[slot])) if slot < len(experts) else check


def alike_values(tap: str, origin: Origin, repeats: int) -> float | None:
    """How many errors count as one in the tests of size and lean; None where these tests do not apply."""
    if step_of(tap) == "attention.scores":
        return None  # all share the error of one constant, 1 / sqrt(head_dim)
    if origin.spans == 1 and step_of(tap) in MIXING:
        return float(repeats)  # equal tokens err alike
    layers = {layer_of(name) for name in (tap, *origin.since)}
    if origin.rung == FREE or len(layers) > 2 or not origin.since:
        return None
    return max(LIKE_POINTWISE, float(repeats))


def _routing_check(mine: list[Decision], invalid: str | None, run: str, tap: str, origin: Origin) -> Check:
    """The check of a choice of experts.   mine: its decisions   invalid: what is no choice at all, in words"""
    illegal = [d for d in mine if not d.legal]
    values = len(mine)
    if invalid is not None:
        return Check(run, tap, origin.since, origin.rung, FAIL, invalid, values, 0, 1)
    if illegal:
        d = illegal[0]
        reason = (
            f"{len(illegal)} of {values} decisions are illegal; token {d.token} found {as_set(d.found)}, expected "
            f"{as_set(d.expected)}: {d.kind}, margin {d.margin:.3g} against {d.movable:.3g} that rounding can move"
        )
        return Check(run, tap, origin.since, origin.rung, FAIL, reason, values, 0, len(illegal))
    return Check(run, tap, origin.since, origin.rung, PASS, "each choice is a top-k of legal logits", values)


def acquit(checks: list[Check], again: list[Check], reason: str) -> list[Check]:
    """Checks that failed but do not in another pass take its verdict.

    What one leaves open where refmoe chose experts says nothing against what the other found there.
    """
    found = {
        (check.run, check.tap): check.verdict
        for check in again
        if check.verdict == PASS or (check.verdict == UNDECIDABLE and check.rung != FREE)
    }
    return [
        replace(check, verdict=found[check.run, check.tap], reason=reason)
        if check.verdict == FAIL and (check.run, check.tap) in found
        else check
        for check in checks
    ]


def conclude(
    trace: Trace, name: str, policy: Policy, significance: float, contents: Contents, findings: Findings,
    checks: list[Check],
) -> Report:  # fmt: skip
    """The report: verdict, headline, the first wrong step."""
    failed = [check for check in checks if check.verdict == FAIL]
    decided = sum(check.values - check.undecided for check in checks if check.verdict != UNDECIDABLE)
    total = sum(check.values for check in checks)
    if failed:
        verdict = NOT_CONFORMANT
        headline = f"not conformant with {policy.name}: {failed[0].run}/{failed[0].tap}: {failed[0].reason}"
    elif 2 * decided <= total:
        verdict = CANNOT_JUDGE
        headline = f"cannot judge: {total - decided} of {total} values have no bound under {policy.name}"
    else:
        verdict = CONFORMANT
        headline = (
            f"conformant with {policy.name}: {decided} of {total} values tested, none is impossible or improbable"
        )
    producer = " ".join(trace.header.producer.get(key, "") for key in ("name", "version")).strip() or "unknown"
    return Report(
        str(trace.path), name, producer, policy.name, significance, verdict, headline, tuple(checks),
        tuple(findings.decisions), (failed[0].run, failed[0].tap) if failed else None, contents.missing,
        contents.unknown, tuple(notes(contents, checks, findings)),
    )  # fmt: skip


def notes(contents: Contents, checks: list[Check], findings: Findings) -> list[str]:
    """What could not be said, and what would have to be in the trace to say it."""
    said = list(contents.notes)
    if contents.missing:
        local = sum(check.rung == LOCAL for check in checks)
        said.append(
            f"{local} of {len(checks)} taps were checked from their direct inputs; the trace lacks "
            f"{', '.join(contents.missing)}, so that faults between its taps show later, or less"
        )
    kinds = {kind: sum(n for (k, _), n in findings.counts.items() if k == kind) for kind, _ in findings.counts}
    if "router.experts" in contents.missing and sum(kinds.values()) > kinds.get("forced", 0):
        said.append(
            "the choice of experts is not in the trace: where rounding can decide it, what follows has no bound"
        )
    return said
