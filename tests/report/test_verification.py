"""A verification on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from refmoe.report.verification import LISTED, print_report
from refmoe.verifier.findings import Report
from tests.report.sample_reports import SAMPLES, all_wrong, empty, failing, hostile, undecidable


def printed(report: Report, width: int = 118, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_most_important_comes_first() -> None:
    lines = printed(failing()).splitlines()
    assert lines[0] == "NOT CONFORMANT"
    assert lines[1].strip() == failing().headline
    assert lines[4] == "first wrong step: layers.0.router.logits, run prefill, token 11, expert 7"
    assert lines[5].strip() == "found 0.523, expected 0.3125, legal 0.3115 to 0.3135, sigma 0.00021"
    assert lines[6].strip().startswith("impossible under the policy: 3 of 128 values lie outside")
    assert lines[7].strip().endswith("everything before it passes (13 checks)")


def test_each_failure_says_what_it_proves() -> None:
    text = printed(failing())
    assert "FAIL  layers.0.expert.output   prefill, token 11, slot 1, channel 63\n" in text
    assert "      improbable at significance 1e-06: the worst value lies 31.2 standard deviations" in text
    assert "UNDECIDABLE  1 check: no value has a finite bound over a segment this long\n" in text
    assert "found {2, 5}, expected {2, 7}: forced, margin 0.031 against 0.004 that bfloat16 can move" in text
    assert "routing: 36 decisions: 32 forced, 2 tie, 2 contestable\n" in text
    assert "not in the trace: attention.q_rope, expert.hidden\n" in text
    assert "keys that name no tap: prefill/layers.0.rotary.cos\n" in text
    assert "note: The accumulator" in text


def row(text: str, step: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(f"{step} "))


def test_a_pipe_gets_all_columns_and_a_narrow_terminal_the_verdict() -> None:
    assert row(printed(failing()), "router.logits") == ["router.logits", "6", "5", "1", "0", "214", "1003", "12.1"]
    narrow = printed(failing(), 60)
    assert row(narrow, "router.logits") == ["router.logits", "1", "0", "214"]
    assert all(len(line) <= 60 for line in narrow.splitlines() if line.startswith(("step ", "router.", "expert.")))


def test_a_console_of_its_own_writes_all_columns_to_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(failing())
    assert row(capsys.readouterr().out, "router.logits")[-1] == "12.1"


def test_no_list_is_without_end() -> None:
    text = printed(all_wrong())
    assert text.count("FAIL  layers.0.") <= 2 * LISTED + 1
    assert "and 47150 failed checks more\n" in text
    assert "and 49998 illegal decisions more\n" in text
    assert len(text) < 20_000


def test_names_cannot_command_the_terminal() -> None:
    for terminal in (False, True):
        text = printed(hostile(), terminal=terminal)
        assert "[bold]:smile:\\x1b[31m\\x00\\u202e\\ud800" in text
        assert "\x1b[31m\x00" not in text
        assert "\u202e" not in text
        assert text.count("[bold]") == text.count(":smile:") == text.count("<script>") > 10
        text.encode()


def test_nothing_checked_and_nothing_judged_are_said() -> None:
    assert printed(empty()).startswith("CANNOT JUDGE\n")
    assert "no step was checked\n" in printed(empty())
    assert "routing: no decision could be judged\n" in printed(empty())
    assert "4 not in the trace" in printed(undecidable())


@pytest.mark.parametrize("name", SAMPLES)
def test_every_report_can_be_printed(name: str) -> None:
    for width in (30, 118):
        assert printed(SAMPLES[name](), width)
