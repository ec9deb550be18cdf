# SPDX-License-Identifier: Apache-2.0
"""The badge and the summary of a run: they say what was judged, and nothing is green that was not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from refmoe.engines.known import CANNOT, FAILED, WELL, Failures, KnownFailure, sort_failures, whole_verdict
from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.engines.results import NOT_JUDGED, SKIPPED, VERDICTS, Outcome, Results
from refmoe.report.conform_junit import run_junit
from refmoe.report.conform_markdown import run_markdown
from refmoe.report.conform_sarif import run_sarif
from refmoe.report.scoreboard_text import print_results
from refmoe.report.sources import Place, Sources
from refmoe.report.standing import badge, standing
from refmoe.verifier.findings import ALL_TAPS, CANNOT_JUDGE, CONFORMANT, NOT_CONFORMANT
from tests.engines.test_results import CAUSE, RESULTS, known, outcome

NOT_GREEN = ("yellow", "lightgrey", "orange", "red")


def run_of(*outcomes: Outcome) -> Results:
    return replace(RESULTS, outcomes=outcomes, cases={each.case: "aa" for each in outcomes})


def right(case: str, dtype: str = "float32", taps: str | None = ALL_TAPS) -> Outcome:
    return outcome(case, dtype, CONFORMANT, "9 of 9 values tested", taps=taps)


def wrong(case: str, step: str = "router.logits", dtype: str = "float32") -> Outcome:
    tap = f"layers.0.{step}"
    return outcome(case, dtype, NOT_CONFORMANT, "3 of 9", first_wrong=("prefill", tap), explanations=(CAUSE,))


def said(results: Results, listed: Sequence[KnownFailure] = ()) -> dict[str, Any]:
    """The badge, which has the fields that shields.io takes, and none empty."""
    values = json.loads(badge(standing(results, sort_failures(results, listed))))
    assert values.keys() - {"isError"} == {"schemaVersion", "label", "message", "color"}
    assert values["schemaVersion"] == 1
    assert values["message"]
    assert values["label"]
    return dict(values)


@pytest.mark.parametrize(
    ("outcomes", "listed", "message", "color"),
    [
        ([right("a"), right("b")], [], "conformant: 2 of 2", "brightgreen"),
        ([right("a"), right("b", taps="logits")], [], "conformant as far as logits show: 2 of 2", "yellowgreen"),
        ([right("a", taps="")], [], "conformant as far as its taps show: 1 of 1", "yellow"),
        ([right("a", taps=None)], [], "conformant as far as its taps show: 1 of 1", "yellow"),
        ([right("a"), outcome("b", "float32", SKIPPED, "no")], [], "conformant: 1 of 2, 1 skipped", "yellow"),
        ([right("a"), outcome("b", "float32", NOT_JUDGED, "it overflows")], [], "conformant: 1 of 2, 1 not judged",
         "yellowgreen"),
        ([right("a"), wrong("b")], [], "wrong at router.logits: 1 of 2", "red"),
        ([wrong("a"), wrong("b"), wrong("c", "attention.q")], [], "wrong at router.logits and 1 other step: 3 of 3",
         "red"),
        ([right("a"), outcome("b", "float32", CRASHED, "it ended")], [], "crashed: 1 of 2", "red"),
        ([outcome("a", "float32", SKIPPED, "no")], [], "cannot judge: 0 of 1 conformant, 1 skipped", "lightgrey"),
        ([right("a"), outcome("b", "float32", CANNOT_JUDGE, "no bound")], [],
         "cannot judge: 1 of 2 conformant, 1 cannot judge", "lightgrey"),
        ([right("a"), wrong("b")], known("b float32"), "conformant: 1 of 2, 1 known failure", "yellow"),
        ([right("a"), right("b")], known("b float32"), "conformant where a known failure is listed: 1 of 2", "orange"),
    ],
)  # fmt: skip
def test_a_badge(outcomes: list[Outcome], listed: list[KnownFailure], message: str, color: str) -> None:
    """Logits were measured to show most known bugs. No other set of taps counts as measured."""
    values = said(run_of(*outcomes), listed)
    assert (values["message"], values["color"]) == (message, color)


def test_nothing_is_green_that_was_not_judged() -> None:
    """All pairs of verdicts, each known to fail or not, with taps that are strong or weak."""
    green = set()
    for first, second, listed, taps in product(VERDICTS, VERDICTS, (False, True), (ALL_TAPS, "", None)):
        outcomes = [
            outcome(case, "float32", verdict, "why", taps=taps if verdict == CONFORMANT else None)
            for case, verdict in (("a", first), ("b", second))
        ]
        results = run_of(*outcomes)
        failures = sort_failures(results, known("a float32") if listed else [])
        values = said(results, known("a float32") if listed else [])
        verdict = whole_verdict(results, failures)
        assert values.get("isError", False) == (verdict != WELL)
        if "green" in values["color"]:
            green.add((frozenset((first, second)), taps))
            assert verdict == WELL
            assert {each.verdict for each in outcomes} <= {CONFORMANT, NOT_JUDGED}
            assert not failures.known
        else:
            assert values["color"] in NOT_GREEN
    assert green == {(frozenset({CONFORMANT}), ALL_TAPS), (frozenset({CONFORMANT, NOT_JUDGED}), ALL_TAPS)}


# ---- the summary

ODD = "<img src=x onerror=alert(1)> | a\n\n# b `c` [d](http://e) \x1b[31m \u202e \ud800"


def page(markdown: str) -> str:
    markdown_it = pytest.importorskip("markdown_it")
    return str(markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def cells(html: str) -> list[list[str]]:
    """The rows of all tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [
        [
            unescape(re.sub(r"<[^>]*>", " ", cell)).strip()
            for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def test_a_summary_has_counts_failures_and_all_that_was_not_judged() -> None:
    results = run_of(
        right("a"), wrong("b"), wrong("c"), outcome("d", "float32", SKIPPED, "no window", issue="https://example.org/2"),
        outcome("e", "float32", CRASHED, "it ended"), wrong("f", "attention.q"),
    )  # fmt: skip
    html = page(run_markdown(results, sort_failures(results, known("f float32"))))
    assert "<strong>wrong at router.logits: 2 of 6</strong>" in html
    rows = cells(html)
    assert rows[:2] == [
        ["dtype", "policy", "conformant", "deviates", "undecidable", "overflows", "not supported", "crashed"],
        ["float32", "float32", "1", "3", "0", "0", "1", "1"],
    ]
    (group,) = [row for row in rows if row[0].startswith("b (float32), c (float32)")]
    assert "layers.0.router.logits" in group[1]
    assert "rope-sign-flipped" in group[2]
    assert ["f float32", "a reason"] in rows
    assert ["d (float32)", "no window ( issue )"] in rows
    assert 'href="https://example.org/2"' in html


def test_a_summary_shows_what_a_stranger_says_as_text() -> None:
    """No tag, link or heading but those of the page itself, and each row has its cells."""
    odd = outcome(
        ODD, "float32", NOT_CONFORMANT, ODD, first_wrong=(ODD, "logits"), explanations=(replace(CAUSE, about=ODD),)
    )
    results = run_of(odd, outcome("b", "float32", SKIPPED, ODD, issue=ODD), outcome("c", "float32", BROKEN, ODD))
    results = replace(results, engine=replace(results.engine, name=ODD), smoke=ODD, notes=(ODD,))
    listed = [KnownFailure(ODD, "c", "float32", ODD, issue=ODD)]
    markdown = run_markdown(results, sort_failures(results, listed))
    assert all(line.isprintable() for line in markdown.splitlines())
    html = page(markdown)
    assert {*re.findall(r"<(\w+)", html)} <= {
        "h3", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "br", "code", "ul", "li"
    }  # fmt: skip
    assert {len(row) for row in cells(html)} <= {2, 3, 8}


def test_a_summary_of_a_large_run_fits_where_it_is_shown() -> None:
    """GitHub shows at most 1 MiB of a summary. 1,000 cases, each with a reason of its own, of the longest length."""
    outcomes = [outcome(f"case-{i}", "float32", CRASHED, f"{i} " + "x" * 2000) for i in range(1000)]
    results = run_of(*outcomes)
    assert len(run_markdown(results, sort_failures(results, ())).encode()) < 1 << 20


# ---- JUnit


def tree(results: Results, listed: Sequence[KnownFailure] = ()) -> ElementTree.Element:
    return ElementTree.fromstring(run_junit(results, sort_failures(results, listed)).encode())


def kinds(root: ElementTree.Element) -> dict[tuple[str | None, str | None], str | None]:
    """Per test case what it has, None where it passes."""
    return {
        (case.get("classname"), case.get("name")): next((child.tag for child in case), None)
        for case in root.iter("testcase")
    }


def test_a_suite_per_dtype_and_a_test_case_per_case() -> None:
    results = run_of(
        right("a"), wrong("b"), outcome("c", "float32", SKIPPED, "no"), outcome("d", "float32", TIMED_OUT, "no answer"),
        outcome("e", "float32", CANNOT_JUDGE, "no bound"), right("f"), wrong("g"), wrong("a", dtype="bfloat16"),
        outcome("h", "float32", NOT_JUDGED, "it overflows"),
    )  # fmt: skip
    root = tree(results, known("f float32", "g float32"))
    assert [suite.get("name") for suite in root] == ["float32", "bfloat16"]
    assert kinds(root) == {
        ("engine.float32", "a"): None, ("engine.float32", "b"): "failure", ("engine.float32", "c"): "skipped",
        ("engine.float32", "d"): "failure", ("engine.float32", "e"): "error", ("engine.float32", "f"): "failure",
        ("engine.float32", "g"): "skipped", ("engine.float32", "h"): "skipped", ("engine.bfloat16", "a"): "failure",
    }  # fmt: skip
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("9", "4", "1", "3")
    (failure,) = [case.find("failure") for case in root.iter("testcase") if case.get("name") == "b"]
    assert failure is not None
    assert "rope-sign-flipped" in (failure.text or "")
    assert "layer 0" in failure.get("message", "")


def test_junit_is_well_formed_whatever_a_stranger_says() -> None:
    odd = outcome(
        ODD, "float32", NOT_CONFORMANT, ODD, first_wrong=(ODD, "logits"), explanations=(replace(CAUSE, about=ODD),)
    )
    results = run_of(odd, outcome("b", "float32", SKIPPED, ODD))
    root = tree(replace(results, engine=replace(results.engine, name=ODD), smoke=ODD))
    assert root.get("failures") == "1"


def test_every_report_agrees_with_the_exit_status() -> None:
    """A run fails exactly where a test case of JUnit fails, and cannot be judged where one is an error or all skip."""
    for first, second, listed in product(VERDICTS, VERDICTS, (False, True)):
        results = run_of(outcome("a", "float32", first, "why"), outcome("b", "float32", second, "why"))
        entries = known("a float32") if listed else []
        failures: Failures = sort_failures(results, entries)
        root = tree(results, entries)
        verdict = whole_verdict(results, failures)
        assert (root.get("failures") != "0") == (verdict == FAILED), (first, second, listed)
        if root.get("errors") != "0":
            assert verdict in (CANNOT, FAILED)


def test_the_files_of_a_run_are_written(tmp_path: Path) -> None:
    path = tmp_path / "badge.json"
    path.write_text(badge(standing(run_of(right("a")), Failures((), (), ()))))
    assert json.loads(path.read_text())["message"] == "conformant: 1 of 1"


def test_every_report_says_how_the_weights_were_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """Else a run of other weights would read as one of the suite's own."""
    changed, none = replace(run_of(right("a")), fresh=71, quantised="gguf:Q4_K_M"), sort_failures(RESULTS, ())
    print_results(changed, none, {})
    texts = (capsys.readouterr().out, run_markdown(changed, none), run_junit(changed, none))
    for text in (*texts, run_sarif(changed, none, Sources({}, Place("a.py", 1, 1)))):
        assert "71" in text
        assert "Q4" in text
