# SPDX-License-Identifier: Apache-2.0
"""A verification as JUnit XML, for tools that show test results: a suite per run, a test case per check."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from refmoe.report.summary import run_names
from refmoe.report.wording import (
    NOTHING_EXPLAINS,
    basis,
    choice,
    count,
    explanation,
    found_and_expected,
    place,
    power,
    visible,
    why,
)
from refmoe.verifier.findings import (
    CANNOT_JUDGE,
    CONFORMANT,
    FAIL,
    UNDECIDABLE,
    Check,
    Decision,
    Explanation,
    Report,
    as_set,
)

LISTED = 20
"""The most illegal decisions of one layer that are listed."""


def to_junit(report: Report) -> str:
    """The report as an XML document.

    A failed check is a failure, and an undecidable check is skipped. A verdict that no test case shows gets a test case
    of its own, as for a trace with nothing to judge. A file without tests would count as success.
    """
    root = Element("testsuites", name="refmoe verify")
    checks: dict[str, list[Check]] = {}
    decisions: dict[str, dict[int, list[Decision]]] = {}
    for check in report.checks:
        checks.setdefault(check.run, []).append(check)
    for decision in report.decisions:
        decisions.setdefault(decision.run, {}).setdefault(decision.layer, []).append(decision)
    for run in run_names(report):
        suite = SubElement(root, "testsuite", name=visible(run))
        _properties(suite, report)
        for check in checks.get(run, []):
            _check(suite, report, check)
        for layer, made in sorted(decisions.get(run, {}).items()):
            _routing(suite, report, layer, made)
    if report.verdict != CONFORMANT and root.find(".//failure") is None:
        _verdict(root, report)
    if report.explanations is not None:
        _explanations(root, report.explanations)
    return document(root)


def document(root: Element) -> str:
    """The text of a document of suites, whose counts are set."""
    for parent in (*root, root):
        _count(parent)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _properties(suite: Element, report: Report) -> None:
    properties = SubElement(suite, "properties")
    for name in ("trace", "subject", "producer", "policy", "significance", "verdict", "headline"):
        SubElement(properties, "property", name=name, value=visible(str(getattr(report, name))))
    if report.power is not None:
        SubElement(properties, "property", name="power", value=power(report.power))


def _case(suite: Element, layer: int | None, name: str) -> Element:
    """Add a test case. Its class name holds the run: some readers tell test cases apart by class and name alone."""
    where = "model" if layer is None else f"layers.{layer}"
    return SubElement(suite, "testcase", classname=f"{suite.get('name')}.{where}", name=visible(name))


def _check(suite: Element, report: Report, check: Check) -> None:
    case = _case(suite, check.layer, check.tap)
    if check.verdict == FAIL:
        failure = SubElement(case, "failure", message=why(check, report), type=FAIL)
        lines = [basis(check)]
        if check.worst is not None:
            lines = [place(check.step, check.worst.where, check.worst.expert), found_and_expected(check.worst), *lines]
        failure.text = "\n".join(lines)
    elif check.verdict == UNDECIDABLE:
        SubElement(case, "skipped", message=visible(check.reason))


def _routing(suite: Element, report: Report, layer: int, made: list[Decision]) -> None:
    case = _case(suite, layer, f"layers.{layer}.routing")
    illegal = [decision for decision in made if not decision.legal]
    if illegal:
        first = illegal[0]
        message = f"{len(illegal)} of {count(len(made), 'decision')} illegal, the first at token {first.token}: "
        message += f"found {as_set(first.found)}, expected {as_set(first.expected)}"
        failure = SubElement(case, "failure", message=message, type=FAIL)
        lines = [f"token {decision.token}: {choice(decision, report.policy)}" for decision in illegal[:LISTED]]
        lines += [f"and {len(illegal) - LISTED} more"] * (len(illegal) > LISTED)
        failure.text = "\n".join(lines)
    elif not any(decision.found for decision in made):
        SubElement(case, "skipped", message="the trace shows no choice of experts")


def _explanations(root: Element, explanations: tuple[Explanation, ...]) -> None:
    """Add the explanations as the output of the first failed test case, where readers show printed text."""
    case = next((case for case in root.iter("testcase") if case.find("failure") is not None), None)
    if case is not None:
        parts = ["\n".join(explanation(found)) for found in explanations]
        SubElement(case, "system-out").text = "\n\n".join(parts) or NOTHING_EXPLAINS


def _verdict(root: Element, report: Report) -> None:
    suite = SubElement(root, "testsuite", name="verdict")
    _properties(suite, report)
    case = SubElement(suite, "testcase", classname="verdict", name=visible(report.subject))
    kind = "error" if report.verdict == CANNOT_JUDGE else "failure"
    SubElement(case, kind, message=visible(report.headline), type=report.verdict)


def _count(parent: Element) -> None:
    """Set the counts of test cases, which readers show as given. A report has no times, so the time is 0."""
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        parent.set(attribute, str(sum(1 for _ in parent.iter(tag))))
    parent.set("time", "0")
