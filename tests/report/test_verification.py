# SPDX-License-Identifier: Apache-2.0
"""A verification on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from refmoe.report.verification import LISTED, print_report
from refmoe.report.wording import choice, code, code_place, in_short, lead, why
from refmoe.verifier.findings import FAIL, Report
from tests.report.sample_reports import (
    SAMPLES,
    all_wrong,
    conformant,
    empty,
    failing,
    hostile,
    quantised,
    undecidable,
)


def printed(report: Report, width: int = 118, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_most_important_comes_first() -> None:
    text = printed(failing())
    lines = text.splitlines()
    assert lines[0] == "NOT CONFORMANT"
    assert lines[1].strip() == lead(failing())
    places = [text.index(words) for words in ("router-input-unnormalised", "example.org", "1.020", "0.3125", "1003")]
    assert places == sorted(places)


def test_no_reason_is_repeated() -> None:
    text = printed(failing())
    for check in failing().checks:
        assert text.count(check.reason) <= 1 or not check.reason


def test_each_failure_and_gap_is_listed() -> None:
    text = printed(failing())
    first, *others = [check for check in failing().checks if check.verdict == FAIL]
    lines = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert why(first, failing()) in text
    for check, line in zip(others, lines, strict=False):
        assert {check.tap, check.run} <= {*line.replace(",", "").split()}
        assert in_short(check) in line
    assert choice(failing().decisions[11], "bfloat16") in text
    for words in (*failing().missing, *failing().unknown, *failing().notes, "no value has a finite bound"):
        assert words in text


def test_codes_other_than_the_rule_s_are_listed_and_without_one_all_are() -> None:
    report = quantised()
    text = printed(report)
    for each in report.codes:
        assert (code_place(each) in text) == each.deviates
    assert code(report.codes[1]) in text
    undecided = replace(report, codes=(report.codes[0], report.codes[2]))
    assert all(code_place(each) in printed(undecided) for each in undecided.codes)
    assert "codes:" not in printed(conformant())


def test_a_legal_error_is_not_a_number() -> None:
    """Nearly all of the allowed error is used by every honest engine: it must not look like a near miss."""
    assert {row(printed(conformant()), step)[4] for step in ("attention.q", "logits")} == {"legal"}
    assert row(printed(failing()), "router.logits")[4] == "214x"


def row(text: str, step: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(f"{step} "))


def test_a_pipe_gets_all_columns_and_a_narrow_terminal_the_verdict() -> None:
    assert row(printed(failing()), "router.logits") == ["router.logits", "5", "1", "0", "214x", "1003", "12.1"]
    narrow = printed(failing(), 60)
    assert row(narrow, "router.logits") == ["router.logits", "1", "0", "214x"]
    assert all(len(line) <= 60 for line in narrow.splitlines() if line.startswith(("step ", "router.", "expert.")))


def test_a_console_of_its_own_writes_all_columns_to_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(failing())
    assert row(capsys.readouterr().out, "router.logits")[-1] == "12.1"


def test_no_list_is_without_end() -> None:
    text = printed(all_wrong())
    assert text.count("FAIL  layers.0.") <= 2 * LISTED + 1
    assert "and 47149 more\n" in text
    assert "and 49998 illegal decisions more\n" in text
    assert f"and {7000 - LISTED} more codes" in text
    assert len(text) < 20_000


def test_names_cannot_command_the_terminal() -> None:
    for terminal in (False, True):
        text = printed(hostile(), terminal=terminal)
        assert "[bold]:smile:\\x1b[31m\\x00\\u202e\\ud800" in text
        assert "\x1b[31m\x00" not in text
        assert "\u202e" not in text
        assert text.count("[bold]") == text.count(":smile:") == text.count("<script>") > 10
        text.encode()


@pytest.mark.parametrize("name", ["failing", "conformant", "undecidable"])
@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_gets_whole_words_and_a_pipe_whole_lines(name: str, width: int) -> None:
    report = SAMPLES[name]()
    plain = [line.rstrip() for line in printed(report, width).splitlines()]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert shown.split() == " ".join(plain).split()
    assert any(line.startswith("judged: ") and report.trace in line and report.subject in line for line in plain)


def test_nothing_checked_and_nothing_judged_are_said() -> None:
    assert printed(empty()).startswith(f"CANNOT JUDGE\n      {empty().headline}\n")
    assert not [line for line in printed(empty()).splitlines() if line.startswith("step ")]
    assert [line for line in printed(undecidable()).splitlines() if line.startswith("routing: ") and "4 not" in line]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_report_can_be_printed(name: str) -> None:
    for width in (30, 118):
        assert printed(SAMPLES[name](), width)
