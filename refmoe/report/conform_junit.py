# SPDX-License-Identifier: Apache-2.0
"""A run of cases as JUnit XML: a suite for each dtype, a test case for each case."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement

from refmoe.engines.known import Failures
from refmoe.engines.observations import policies_used
from refmoe.engines.results import NOT_JUDGED, SKIPPED, Outcome, Results
from refmoe.report.conform_words import about_weights, cause, engine_words, what
from refmoe.report.junit import document
from refmoe.report.wording import visible
from refmoe.verifier.findings import CANNOT_JUDGE


def run_junit(results: Results, failures: Failures) -> str:
    """The run as an XML document.

    A failure that is known is skipped, and a known failure that passes fails, as in the exit status. A case that cannot
    be judged is an error.
    """
    root = Element("testsuites", name="refmoe conform")
    known = {(each.case, each.dtype): entry.reason for each, entry in failures.known}
    passing = {(each.case, each.dtype): entry.reason for each, entry in failures.passing}
    for dtype, policy in policies_used(results).items():
        suite = SubElement(root, "testsuite", name=dtype)
        properties = SubElement(suite, "properties")
        for name, value in {
            "engine": engine_words(results.engine), "policy": str(policy), "significance": f"{results.significance:g}",
            "smoke test": results.smoke, "refmoe": results.refmoe,
            **dict(said.split(": ", 1) for said in about_weights(results)),
        }.items():  # fmt: skip
            SubElement(properties, "property", name=name, value=visible(value))
        for each in results.outcomes:
            if each.dtype == dtype:
                _case(suite, results.engine.name, each, known, passing)
    return document(root)


def _case(
    suite: Element, engine: str, outcome: Outcome,
    known: dict[tuple[str, str], str], passing: dict[tuple[str, str], str],
) -> None:  # fmt: skip
    """Add a test case.   known, passing: per case and dtype the reason why a failure was expected"""
    case = SubElement(suite, "testcase", classname=visible(f"{engine}.{outcome.dtype}"), name=visible(outcome.case))
    place = outcome.case, outcome.dtype
    if place in known:
        SubElement(case, "skipped", message=visible(f"known to fail: {known[place]}"))
    elif place in passing:
        said = f"conformant, but listed as known to fail: {passing[place]}"
        SubElement(case, "failure", message=visible(said), type="known failure passes")
    elif outcome.failed:
        kind = "error" if outcome.verdict == CANNOT_JUDGE else "failure"
        found = SubElement(case, kind, message=what(outcome), type=outcome.verdict)
        found.text = "\n".join([visible(outcome.reason), *cause(outcome)])
    elif outcome.verdict in (SKIPPED, NOT_JUDGED):
        SubElement(case, "skipped", message=visible(f"{outcome.verdict}: {outcome.reason}"))
