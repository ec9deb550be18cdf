# SPDX-License-Identifier: Apache-2.0
"""A verification as one self-contained HTML page. It needs no network, and can be read without script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

from refmoe.engines.first_wrong import wrong_choices
from refmoe.report import wording
from refmoe.report.error_plot import crowded, error_plot, interval_plot
from refmoe.report.heat_map import LEVELS, heat_map
from refmoe.report.page import render
from refmoe.report.routing_strips import MARKS, routing_strips
from refmoe.report.summary import run_names, summarise_routing, summarise_steps, telling
from refmoe.suite.power import in_words
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, FAIL, UNDECIDABLE, Check, Decision, Report, as_set

LISTED = 100
"""The most failed checks, decisions and names that the page lists. The JSON report has all of them."""

FEW_DECISIONS = 600
"""The most decisions for which the page has a table of all of them, and open strips of the runs."""

VERDICTS = {CONFORMANT: ("good", "✓"), CANNOT_JUDGE: ("unsure", "?")}


@dataclass(frozen=True)
class CheckView:
    """The texts of a check on the page."""

    run: str
    tap: str
    place: str
    found: str
    """``-`` for a check without a worst element, and so are the next three."""
    expected: str
    legal: str
    sigma: str
    error: str
    excess: str
    """The excess and its limit; empty where the test does not apply."""
    manner: str
    reason: str
    basis: str


@dataclass(frozen=True)
class DecisionView:
    """The texts of a routing decision on the page."""

    run: str
    layer: int
    token: int
    kind: str
    legal: str
    found: str
    expected: str
    margin: str
    movable: str


def to_html(report: Report) -> str:
    """The page as text, to be written as UTF-8. Raises InputError when Jinja2 is missing."""
    failed = [check for check in report.checks if check.verdict == FAIL]
    routing = summarise_routing(report)
    name, symbol = VERDICTS.get(report.verdict, ("bad", "✕"))
    return render(
        "verification.html.j2",
        ["verification.css"],
        "verification.js",
        "the HTML report",
        report=report,
        verdict={"name": name, "symbol": symbol},
        lead=wording.lead(report),
        verdict_words=in_words(report),
        power=wording.power(report.power) if report.power is not None else "",
        first=_first_wrong(report),
        explanations=(report.explanations or ())[:LISTED],
        fit=wording.fit,
        small=wording.small,
        alternatives=wording.alternatives,
        nothing_explains=wording.NOTHING_EXPLAINS,
        runs=run_names(report),
        map=heat_map(report),
        levels=LEVELS,
        plot=error_plot(report),
        crowded=crowded(report),
        steps=summarise_steps(report),
        failures=[_check(check, report) for check in failed[:LISTED]],
        failed=len(failed),
        undecidable=_open_reasons(report),
        routing=routing,
        marks=MARKS,
        strips=routing_strips(report),
        illegal=[_decision(d) for d in routing.illegal[:LISTED]],
        deviating=[_decision(d) for d in routing.deviating[:LISTED]],
        every=[_decision(d) for d in report.decisions] if len(report.decisions) <= FEW_DECISIONS else [],
        codes=[(wording.code_place(each), wording.code(each)) for each in telling(report.codes)[:LISTED]],
        codes_line=wording.codes(report.codes, report.policy) if report.codes else "",
        more_codes=len(telling(report.codes)) - LISTED,
        listed=LISTED,
        number=wording.number,
        error_text=wording.error_text,
        count=wording.count,
    )


def _first_wrong(report: Report) -> dict[str, object] | None:
    if report.first_wrong is None:
        return None
    run, tap = report.first_wrong
    check = report.check(run, tap)
    return {
        "run": run,
        "tap": tap,
        "check": None if check is None else _check(check, report),
        "plot": "" if check is None or check.worst is None else interval_plot(check.worst),
        "preceding": wording.preceding(report, run, tap),
        "choices": [
            {"token": d.token, "text": wording.choice(d, report.policy)} for d in wrong_choices(report, run, tap)[1:5]
        ],
    }


def _check(check: Check, report: Report) -> CheckView:
    worst = check.worst
    return CheckView(
        run=check.run,
        tap=check.tap,
        place=wording.place(check.step, worst.where, worst.expert) if worst else "",
        found=wording.value_text(worst.found) if worst else "-",
        expected=wording.value_text(worst.expected) if worst else "-",
        legal=wording.legal(worst) if worst else "-",
        sigma="-" if worst is None or math.isnan(worst.sigma) else wording.number(worst.sigma),
        error=wording.error_words(check.worst_error),
        excess=wording.excess_words(check),
        manner=wording.manner(check, report),
        reason=check.reason,
        basis=wording.basis(check),
    )


def _decision(d: Decision) -> DecisionView:
    found = as_set(d.found) if d.found else "-"
    legal = "legal" if d.legal else "illegal"
    expected, margin, movable = as_set(d.expected), wording.number(d.margin), wording.number(d.movable)
    return DecisionView(
        run=d.run,
        layer=d.layer,
        token=d.token,
        kind=d.kind,
        legal=legal,
        found=found,
        expected=expected,
        margin=margin,
        movable=movable,
    )


def _open_reasons(report: Report) -> list[tuple[str, int]]:
    """The reasons why checks are undecidable, with the number of checks, the most frequent first."""
    reasons: dict[str, int] = {}
    for check in report.checks:
        if check.verdict == UNDECIDABLE:
            reasons[check.reason] = reasons.get(check.reason, 0) + 1
    return list(islice(sorted(reasons.items(), key=lambda entry: -entry[1]), LISTED))
