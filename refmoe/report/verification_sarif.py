# SPDX-License-Identifier: Apache-2.0
"""A verification as SARIF: one alert at the line that the user named for the first wrong step."""

from __future__ import annotations

from refmoe.engines.first_wrong import first_token
from refmoe.report import sarif
from refmoe.report.sarif import Alert, Log, to_sarif
from refmoe.report.sources import Sources
from refmoe.report.wording import explanation, in_short, lead
from refmoe.spec.taps import layer_of, step_of
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT, Report


def verification_sarif(report: Report, sources: Sources, home: str | None = None) -> str:
    """The file as text, without an alert where the trace is conformant.   home: as in `Log`"""
    alerts = [] if report.verdict == CONFORMANT else [_alert(report, sources)]
    notes = [report.headline, *report.notes]
    return to_sarif(Log(report.producer, alerts, notes, home))


def _alert(report: Report, sources: Sources) -> Alert:
    run, tap = report.first_wrong or ("", "")
    check = report.check(run, tap)
    told = [lead(report), *([in_short(check)] if check is not None else [])]
    told += [line for found in (report.explanations or ())[:1] for line in explanation(found)]
    facts = {"subject": report.subject, "policy": report.policy, "verdict": report.verdict}
    place = {"run": run, "tap": tap, "layer": layer_of(tap), "token": first_token(report)} if tap else {}
    return Alert(
        rule=sarif.CANNOT_JUDGE if report.verdict == CANNOT_JUDGE else sarif.rule_of(step_of(tap)),
        message=" ".join(f"{part.rstrip('.')}." for part in told if part),
        place=sources.of(step_of(tap)),
        within="/".join(filter(None, (report.subject, run, tap))),
        identity=(report.producer, report.subject, report.policy),
        properties={name: value for name, value in (facts | place).items() if value is not None},
    )
