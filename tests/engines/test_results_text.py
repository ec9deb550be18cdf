# SPDX-License-Identifier: Apache-2.0
"""Results on a terminal: failures that are alike are printed once, with the fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refmoe.engines.known import sort_failures
from refmoe.engines.process import CRASHED
from refmoe.engines.results import Cause, Engine, Outcome, Results
from refmoe.report.scoreboard_text import print_results

CAUSE = Cause(
    name="rope-sign-flipped", kind="known bug", about="Rotates the other way.", fix="flip the sign", sources=()
)
CASES = [f"case-{i:02}" for i in range(30)]


def wrong(case: str, dtype: str, layer: int, step: str = "q_rope") -> Outcome:
    first = ("prefill", f"layers.{layer}.attention.{step}")
    reason = f"{layer} of 9 values lie outside"
    return Outcome(
        case=case,
        dtype=dtype,
        policy=dtype,
        verdict="not conformant",
        reason=reason,
        first_wrong=first,
        explanations=(CAUSE,),
    )


def printed(capsys: pytest.CaptureFixture[str], *outcomes: Outcome, logs: dict[str, str] | None = None) -> list[str]:
    results = Results(
        engine=Engine("engine", "1", {}),
        platform={},
        refmoe="0",
        significance=1e-6,
        cases={},
        smoke="case one, twice",
        outcomes=outcomes,
    )
    said = {(each.case, each.dtype): (logs or {}).get(each.case, "") for each in outcomes}
    print_results(results, sort_failures(results, []), said)
    # what comes after the table and its empty line
    return capsys.readouterr().out.splitlines()[5 + len({each.case for each in outcomes}) :]


def test_one_failure_is_said_with_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, wrong("a", "float32", 3)) == [
        "",
        "a float32: not conformant: first wrong step prefill/layers.3.attention.q_rope",
        "    3 of 9 values lie outside",
        "    known bug: rope-sign-flipped: Rotates the other way.",
        "    fix: flip the sign",
        "1 outcome: 1 not conformant",
    ]


def test_no_fix_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, replace(wrong("a", "float32", 3), explanations=(replace(CAUSE, fix=""),)))
    assert not any("fix" in line for line in lines)


def test_those_with_the_same_step_and_cause_are_named_after_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    """In whatever layer, by however much."""
    alike = [wrong(case, dtype, i) for i, case in enumerate("abc") for dtype in ("float32", "bfloat16")]
    lines = printed(capsys, *alike, *(wrong("d", dtype, 0, "k_rope") for dtype in ("float32", "bfloat16")))
    assert [line for line in lines if not line.startswith("  ")] == [
        "",
        "a float32: not conformant: first wrong step prefill/layers.0.attention.q_rope",
        "d float32: not conformant: first wrong step prefill/layers.0.attention.k_rope",
        "8 outcomes: 8 not conformant",
    ]
    assert "    the same in 5 more: a (bfloat16), b (float32, bfloat16), c (float32, bfloat16)" in lines


def test_many_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *(wrong(case, "float32", 0) for case in CASES))
    named = ", ".join(f"{case} (float32)" for case in CASES[1:11])
    assert f"    the same in 29 more: {named} and 19 more cases" in lines


def test_crashes_are_alike_by_their_sentence_and_the_last_words_are_those_of_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    crash = Outcome(
        case="a",
        dtype="float32",
        policy="float32",
        verdict=CRASHED,
        reason="it was ended by SIGSEGV before it answered to run",
    )
    other = replace(crash, case="c", reason="it was ended by SIGABRT before it answered to run")
    lines = printed(capsys, crash, replace(crash, case="b"), other, logs={"a": "no GPU", "b": "no GPU", "c": "abort()"})
    assert lines[1:] == [
        "a float32: crashed",
        "    it was ended by SIGSEGV before it answered to run",
        "    the same in 1 more: b (float32)",
        "    the end of its standard error:",
        "      no GPU",
        "c float32: crashed",
        "    it was ended by SIGABRT before it answered to run",
        "    the end of its standard error:",
        "      abort()",
        "3 outcomes: 3 crashed",
    ]
