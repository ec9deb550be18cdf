# SPDX-License-Identifier: Apache-2.0
"""Verify a trace: its checks, routing decisions, first wrong step and verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from refmoe.checkpoints.names import named_weights
from refmoe.profiles.cut_points import INPUT_CUTS, PROJECTIONS
from refmoe.profiles.policy import Policy
from refmoe.spec.config import Config
from refmoe.spec.model import Parameters
from refmoe.spec.taps import IDS, LOGPROBS, layer_of, observable, step_of
from refmoe.steps.coded import quantises
from refmoe.traces.trace import Run, Trace
from refmoe.verifier.findings import (
    CANNOT_JUDGE,
    CONFORMANT,
    FAIL,
    FREE,
    LOCAL,
    NOT_CONFORMANT,
    PASS,
    UNDECIDABLE,
    Check,
    ContestableCode,
    Decision,
    Report,
    as_set,
)
from refmoe.verifier.free_running import against_noise
from refmoe.verifier.intake import Contents, take_in
from refmoe.verifier.passes import Reading
from refmoe.verifier.provenance import MIXING, Origin, origins
from refmoe.verifier.ranking import Ranking
from refmoe.verifier.segments import Settings, judge_all
from refmoe.verifier.subject import Findings, Subject, with_shared_weights
from refmoe.verifier.tally import LIKE_POINTWISE, Limits, Tally

OPEN_CHOICE = "rounding can decide the choice of experts"
NO_BOUND = "it may overflow, or rounding adds up over too many steps"
GAPS = "the trace's own values of {} are not finite"
"""The reasons for undecided values."""
READS_CACHE = ("attention.scores", "attention.probs", "attention.context")
"""The steps that read the keys and values of earlier runs."""

DEFAULTS = Settings()


def verify(
    trace: Trace,
    name: str,
    config: Config,
    parameters: Parameters,
    runs: tuple[Run, ...] | None,
    policy: Policy,
    settings: Settings = DEFAULTS,
) -> Report:
    """Judge a trace.

    name: the case or checkpoint that the trace is held against, in words
    runs: the runs of the case; None: the trace's own runs
    Raises InputError when the runs, tokens, shapes or dtypes of the trace do not fit the model and the runs.
    """
    contents = take_in(trace, config, runs)
    trace = contents.trace
    subject = Subject(config, parameters, contents.runs, ops=with_shared_weights(settings.ops))
    limits = Limits(settings.significance, contents.values, contents.tensors)
    coded = quantises(policy, named_weights(parameters).values())

    def judge(reading: Reading) -> tuple[Findings, list[Check]]:
        findings = judge_all(trace, subject, policy, limits, contents.present, reading, settings)
        checks = assemble(findings, contents, config, policy, limits, coded)
        # a code that flips is a switch too rare for replicas to show, and as large as a choice of experts
        return findings, checks if coded else against_noise(checks, findings, trace, subject, policy, limits)

    findings, checks = judge(Reading())
    failed = frozenset((check.run, check.tap) for check in checks if check.verdict == FAIL)
    if failed:
        # a dumped tap may be wrong although the engine went on with the right values: recompute it for its consumers
        _, again = judge(Reading(recomputed=failed))
        checks = apply_second_pass(
            checks, again, "the trace's value of its input is wrong, but was not what this step read"
        )
    if policy.consumers == "unrounded" and any(check.verdict == FAIL for check in checks):
        _, again = judge(Reading(unrounded=True))
        checks = apply_second_pass(checks, again, "this step read its input before it was stored")
    report = conclude(trace, name, policy, settings.significance, contents, findings, checks)
    if not coded:
        return report
    codes = in_order(findings.codes.values(), checks)
    return replace(report, codes=codes, notes=(*report.notes, *unknown_codes(checks), *flipping_codes(codes)))


def in_order(codes: Iterable[ContestableCode], checks: Iterable[Check]) -> tuple[ContestableCode, ...]:
    """Codes in order of computation.   checks: of their inputs too, in order of computation"""
    order = {(check.run, check.tap): i for i, check in enumerate(checks)}
    return tuple(sorted(codes, key=lambda code: (order[code.run, code.tap], code.where, code.format)))


def flipping_codes(codes: tuple[ContestableCode, ...]) -> list[str]:
    """A sentence about the codes that rounding alone decides."""
    if not codes:
        return []
    return [
        f"rounding alone decides {len(codes)} code{'' if len(codes) == 1 else 's'} of inputs; one that flips changes "
        f"what follows, so that logits of two legal engines can differ by a hundredth of their size, and no narrow "
        f"verdict on logits alone is possible"
    ]


def unknown_codes(checks: Iterable[Check]) -> list[str]:
    """A sentence about the products whose input is not in the trace, where the engine makes codes of inputs."""
    wide = dict.fromkeys(c.step for c in checks if c.step in PROJECTIONS and c.rung != LOCAL)
    if not wide:
        return []
    return [
        f"the policy rounds inputs of products to codes, which follow from an input in the trace; the trace lacks that "
        f"of {', '.join(wide)}, so each of its codes may err by half a step, and no narrow verdict is possible there"
    ]


def assemble(
    findings: Findings, contents: Contents, config: Config, policy: Policy, limits: Limits, coded: bool = False
) -> list[Check]:
    """The checks of a pass, in order of computation, run by run.

    coded: whether products make codes of their inputs
    """
    checks = []
    chosen = {(d.run, d.layer, d.token): d.found or d.expected for d in findings.decisions}
    decisions: dict[tuple[str, int | None], list[Decision]] = {}
    for decision in findings.decisions:
        decisions.setdefault((decision.run, decision.layer), []).append(decision)
    for run in contents.runs:
        present = contents.present[run.run]
        alike = max(Counter(run.tokens).values())
        came_from = origins(config, present)
        for tap in observable(config):
            if tap not in present:
                continue
            origin = came_from[tap]
            if tap == IDS:
                unjudged = Check(run=run.run, tap=tap, since=origin.since, rung=origin.rung, verdict=PASS, reason="")
                checks.append(findings.rankings.get((run.run, tap), Ranking()).judged(unjudged))
                continue
            if step_of(tap) == "router.experts":
                mine = decisions.get((run.run, layer_of(tap)), [])
                checks.append(_routing_check(mine, findings.invalid.get((run.run, tap)), run.run, tap, origin))
                continue
            tally = findings.tallies.get((run.run, tap), Tally())
            size = alike_values(tap, origin, alike)
            if size is not None and (coded or reads_coarser(policy, step_of(tap))):
                size = max(size, LIKE_POINTWISE)  # all outputs share the roundings of one input
            # rows of a norm stored in the dtype of its statistic: adding eps to rounded means errs alike in every row
            alike_rows = origin.normalises and policy.statistics.precision <= policy.at(step_of(tap)).precision
            if size is not None and alike_rows:
                size = max(size, tally.values / max(tally.rows, 1))
            gap = _gap(findings, run, tap, origin) if tally.undecided else None
            why = GAPS.format(gap) if gap else OPEN_CHOICE if origin.rung == FREE else NO_BOUND
            check = tally.check(run.run, tap, origin, limits, size, not alike_rows, why)
            checks.append(name_expert(check, chosen))
    return checks


def _gap(findings: Findings, run: Run, tap: str, origin: Origin) -> str | None:
    """The first tap that a tap is computed from and that has NaN or infinities in the trace; None if there is none."""
    read = [(run.run, name) for name in origin.since]
    if step_of(tap) in READS_CACHE:
        cached = [f"layers.{layer_of(tap)}.attention.{name}" for name in ("k", "k_rope", "v")]
        read += [(earlier, name) for earlier, name in findings.tallies if name in cached]
    found = (key for key in read if key in findings.tallies and findings.tallies[key].gaps)
    return next((f"{earlier}/{name}" for earlier, name in found), None)


def name_expert(check: Check, chosen: dict[tuple[str, int, int], tuple[int, ...]]) -> Check:
    """The check with the expert of its worst element's slot. chosen: the experts per run, layer and token"""
    if check.worst is None or check.layer is None or not check.step.startswith(("expert.", "router.weights")):
        return check
    token, slot, *_ = check.worst.where
    experts = chosen.get((check.run, check.layer, token), ())
    return replace(check, worst=replace(check.worst, expert=experts[slot])) if slot < len(experts) else check


def alike_values(tap: str, origin: Origin, repeats: int) -> float | None:
    """The number of values that err alike in the tests of size and filter; None where these tests do not apply.

    repeats: the number of times that the most frequent token occurs
    """
    if step_of(tap) in ("attention.scores", LOGPROBS):
        return None  # all scores share the error of one constant, 1 / sqrt(head_dim), and a row of the log of its sum
    if origin.spans == 1 and step_of(tap) in MIXING:
        return float(repeats)  # equal tokens err alike
    layers = {layer_of(name) for name in (tap, *origin.since)}
    if origin.rung == FREE or len(layers) > 2 or not origin.since:
        return None
    return max(LIKE_POINTWISE, float(repeats))


def reads_coarser(policy: Policy, step: str) -> bool:
    """Whether a product rounds its input, which may be narrower than its output."""
    cut = INPUT_CUTS.get(f"{step}.input")
    return cut is not None and not policy.at(f"{step}.input").holds(policy.at(cut.default))


def _routing_check(mine: list[Decision], invalid: str | None, run: str, tap: str, origin: Origin) -> Check:
    """The check of the choices of experts.   mine: the decisions   invalid: the ids that are no choice, in words"""
    check = Check(
        run=run,
        tap=tap,
        since=origin.since,
        rung=origin.rung,
        verdict=PASS,
        reason="each choice is a top-k of legal logits",
        values=len(mine),
    )
    illegal = [d for d in mine if not d.legal]
    if invalid is not None:
        return replace(check, verdict=FAIL, reason=invalid, outside=1)
    if illegal:
        d = illegal[0]
        reason = (
            f"{len(illegal)} of {len(mine)} decisions are illegal; token {d.token} found {as_set(d.found)}, expected "
            f"{as_set(d.expected)}: {d.kind}, margin {d.margin:.3g} against {d.movable:.3g} that rounding can move"
        )
        return replace(check, verdict=FAIL, reason=reason, outside=len(illegal))
    return check


def apply_second_pass(checks: list[Check], again: list[Check], reason: str) -> list[Check]:
    """The checks, where a failed check that does not fail in a second pass is replaced by that of the second pass.

    So the numbers of a check are those of the pass that gave its verdict.
    again: the checks of the second pass   reason: the reason of the checks that change
    An undecidable check on the free-running rung changes nothing: there the second pass chose experts by itself.
    """
    better = {
        (check.run, check.tap): replace(check, reason=reason)
        for check in again
        if check.verdict == PASS or (check.verdict == UNDECIDABLE and check.rung != FREE)
    }
    return [better.get((check.run, check.tap), check) if check.verdict == FAIL else check for check in checks]


def conclude(
    trace: Trace,
    name: str,
    policy: Policy,
    significance: float,
    contents: Contents,
    findings: Findings,
    checks: list[Check],
) -> Report:
    """The report, with verdict, headline and the first wrong step."""
    failed = [check for check in checks if check.verdict == FAIL]
    decided = _decided(checks)
    total = sum(check.values for check in checks)
    last = [*{check.run: check for check in checks}.values()]  # the last check of each run
    if failed:
        verdict = NOT_CONFORMANT
        headline = f"not conformant with {policy.name}: {failed[0].run}/{failed[0].tap}: {failed[0].reason}"
    elif 2 * decided <= total:
        verdict = CANNOT_JUDGE
        headline = f"cannot judge: {total - decided} of {total} values cannot be tested under {policy.name}"
    elif 2 * _decided(last) <= sum(check.values for check in last):
        verdict = CANNOT_JUDGE
        values = sum(check.values for check in last)
        headline = (
            f"cannot judge: {values - _decided(last)} of {values} values of the last step in each run, "
            f"{last[-1].step}, cannot be tested under {policy.name}"
        )
    else:
        verdict = CONFORMANT
        headline = (
            f"conformant with {policy.name}: {decided} of {total} values tested, none is impossible or improbable"
        )
    producer = " ".join(trace.header.producer.get(key, "") for key in ("name", "version")).strip() or "unknown"
    return Report(
        trace=str(trace.path),
        subject=name,
        producer=producer,
        policy=policy.name,
        significance=significance,
        verdict=verdict,
        headline=headline,
        checks=tuple(checks),
        decisions=tuple(findings.decisions),
        first_wrong=(failed[0].run, failed[0].tap) if failed else None,
        missing=contents.missing,
        unknown=contents.unknown,
        notes=tuple(notes(contents, checks, findings)),
    )


def _decided(checks: Iterable[Check]) -> int:
    """The number of values that could be tested."""
    return sum(check.values - check.undecided for check in checks)


def notes(contents: Contents, checks: list[Check], findings: Findings) -> list[str]:
    """The limits of this verification and the taps that would lift them, one sentence each."""
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
