# SPDX-License-Identifier: Apache-2.0
"""A verification as JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from refmoe.report.junit import to_junit
from refmoe.verifier.findings import Report
from tests.report.sample_reports import SAMPLES, conformant, empty, failing, hostile, undecidable


def tree(report: Report) -> Element:
    return ElementTree.fromstring(to_junit(report).encode())


def cases(root: Element, tag: str) -> list[tuple[str | None, str | None]]:
    return [(c.get("classname"), c.get("name")) for c in root.iter("testcase") if c.find(tag) is not None]


def test_a_suite_per_run_and_a_case_per_check_and_routed_layer() -> None:
    root = tree(conformant())
    assert [suite.get("name") for suite in root] == ["prefill", "decode1", "decode2"]
    names = [case.get("name") for case in root[0].iter("testcase")]
    assert names[:2] == ["embedding", "layers.0.attention_norm"]
    assert names[-2:] == ["layers.0.routing", "layers.1.routing"]
    assert len(names) == 45 + 2
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("141", "0", "0", "0")
    identities = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(identities)) == len(identities)


def test_failures_and_what_is_undecidable() -> None:
    root = tree(failing())
    assert cases(root, "failure") == [
        ("prefill.layers.0", "layers.0.router.logits"),
        ("prefill.layers.0", "layers.0.expert.output"),
        ("prefill.layers.1", "layers.1.attention.scores"),
        ("prefill.layers.0", "layers.0.routing"),
    ]
    assert cases(root, "skipped") == [("decode1.layers.1", "layers.1.residual")]
    assert [suite.get("failures") for suite in root] == ["4", "0", "0"]
    assert [suite.get("skipped") for suite in root] == ["0", "1", "0"]
    messages = [failure.get("message", "") for failure in root.iter("failure")]
    assert messages[0].startswith("impossible under the policy: 3 of 128")
    assert messages[1].startswith("improbable at significance 1e-06: ")
    assert messages[3] == "1 of 16 decisions illegal, the first at token 11: found {2, 5}, expected {2, 7}"
    details = [failure.text or "" for failure in root.iter("failure")]
    assert details[0].splitlines()[0] == "token 11, expert 7"
    assert "forced, margin 0.031 against 0.004 that bfloat16 can move" in details[3]


def test_a_verdict_that_no_case_shows_gets_its_own() -> None:
    for report, tag in ((empty(), "error"), (undecidable(), "error")):
        root = tree(report)
        assert cases(root, tag) == [("verdict", report.subject)]
        assert root.get("errors") == "1"
    assert cases(tree(undecidable()), "skipped")[0] == ("prefill.model", "logits")
    assert [suite.get("name") for suite in tree(failing())] == ["prefill", "decode1", "decode2"]


def test_a_trace_without_its_choice_of_experts_has_no_routing_to_pass() -> None:
    root = tree(undecidable())
    assert ("prefill.layers.0", "layers.0.routing") in cases(root, "skipped")


def test_hostile_names_are_text_that_xml_can_hold() -> None:
    root = tree(hostile())
    name = root[0].get("name") or ""
    assert name.startswith("<script>document.title='owned'</script>\"'&amp;]]>")
    assert name.endswith(r"\x1b[31m\x00\u202e\ud800")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_report_is_well_formed_and_counts_itself(name: str) -> None:
    root = tree(SAMPLES[name]())
    for parent in (root, *root):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
            assert parent.get(attribute) == str(len(list(parent.iter(tag))))
    longest = max((len(failure.text or "") for failure in root.iter("failure")), default=0)
    assert longest < 3000  # illegal decisions are not listed without end
