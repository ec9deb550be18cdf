# SPDX-License-Identifier: Apache-2.0
"""The words that all reports share: exact about proofs, and harmless for any name of a tap."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isnan, nan

import pytest

from refmoe.report.summary import share, summarise_routing, summarise_steps
from refmoe.report.wording import (
    alternatives,
    error_text,
    explanation,
    fit,
    is_link,
    lead,
    legal,
    manner,
    number,
    place,
    preceding,
    visible,
)
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.verifier.findings import FAIL, LOCAL, PASS, Check, Element, Report
from tests.report import sample_reports
from tests.report.sample_reports import HOSTILE, WRONG

REPORT = sample_reports.failing()
WRONG_CHECK = Check(run="prefill", tap="logits", since=(), rung=LOCAL, verdict=FAIL, reason="why", values=9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"outside": 1}, "impossible under the policy"),
        ({"worst_error": 1.01, "excess": 50.0, "excess_limit": 12.0}, "impossible under the policy"),
        ({"worst_error": inf}, "impossible under the policy"),
        ({"excess": 12.1, "excess_limit": 12.0}, "improbable at significance 1e-06"),
        ({"rms": 1.5, "rms_limit": 1.2}, "improbable at significance 1e-06"),
        ({"excess": 12.1, "excess_limit": 0.0}, ""),
        ({"rms": 1.5, "rms_limit": nan, "worst_error": nan, "excess": nan, "excess_limit": nan}, ""),
        ({"truncation": 1.0, "truncation_snr": 99.0}, ""),
        ({"verdict": PASS, "outside": 1}, ""),
    ],
)
def test_a_failure_claims_no_more_than_what_failed(fields: dict[str, object], words: str) -> None:
    assert manner(replace(WRONG_CHECK, **fields), REPORT) == words  # type: ignore[arg-type]


def test_every_index_of_every_tap_has_a_name_and_the_token_comes_first() -> None:
    for step, shape in (LAYER_TAPS | MODEL_TAPS).items():
        assert place(step, tuple(range(len(shape.split())))).startswith("token ")
    assert place("router.logits", (11, 7)) == "token 11, expert 7"
    assert place("attention.scores", (3, 11, 5)) == "token 11, head 3, cached position 5"
    assert place("attention.k", (0, 1, 2)) == "token 0, key/value head 1, channel 2"
    assert place("router.logits", (11,)) == place("unheard.of", (11,)) == "element [11]"
    assert place("unheard.of", ()) == ""


def test_what_could_steer_a_reader_s_program_is_shown_as_an_escape() -> None:
    assert visible(HOSTILE).endswith(r"[bold]:smile:\x1b[31m\x00\u202e\ud800")
    assert visible("layers.0.ümlaut 模型 \U0001f600") == "layers.0.ümlaut 模型 \U0001f600"
    assert visible("a\nb\u2028") == r"a\nb\u2028"


def test_numbers_keep_three_digits_and_say_what_they_are_not() -> None:
    found = [number(x) for x in (0.03125, 1.0, 214.0, 1003.4, 99999.4, 123456.0, inf, nan)]
    assert found == ["0.0312", "1", "214", "1003", "99999", "1.23e+05", "inf", "-"]


def test_a_legal_interval_says_when_it_is_none() -> None:
    element = Element(where=(0,), found=0.0, expected=0.0, low=-1.5, high=2.0, sigma=nan)
    assert legal(element) == "-1.5 to 2"
    assert legal(replace(element, low=-inf, high=inf)) == "any value (no finite bound)"
    assert legal(replace(element, low=-inf)) == "-inf to 2"
    assert legal(replace(element, low=nan)) == "not known"


def test_the_lead_names_step_run_and_token() -> None:
    for words in (WRONG, "prefill", "token 11", "expert 7"):
        assert words in lead(REPORT)
    for name, make in sample_reports.SAMPLES.items():
        assert len(lead(make())) > 10, name
        assert lead(make()).isprintable()
    assert lead(sample_reports.conformant()) == sample_reports.conformant().headline
    channels = {step: lead(one_failure(step)) for step in (LAYER_TAPS | MODEL_TAPS)}
    assert all("channel" not in text and "hidden unit" not in text for text in channels.values())
    assert all("token 0" in text for text in channels.values())


def one_failure(step: str) -> Report:
    """A report in which one value of this step is wrong."""
    where = (0,) * len((LAYER_TAPS | MODEL_TAPS)[step].split())
    worst = Element(where=where, found=1.0, expected=0.0, low=0.0, high=0.0, sigma=nan)
    tap = step if step in MODEL_TAPS else f"layers.0.{step}"
    check = replace(WRONG_CHECK, tap=tap, worst=worst)
    return replace(REPORT, checks=(check,), decisions=(), first_wrong=("prefill", tap))


def test_an_explanation_without_a_measured_fit_claims_none() -> None:
    assert REPORT.explanations
    found = REPORT.explanations[0]
    assert "1.020" in fit(found)
    assert "0.010" in fit(found)
    assert "13 wrong values" in fit(replace(found, values=13))
    assert "coefficient" not in fit(replace(found, coefficient=nan))
    assert fit(replace(found, coefficient=nan, residual=nan)) == ""


def test_explanations_that_exclude_each_other_name_the_tap_that_tells_them_apart() -> None:
    assert REPORT.explanations
    found = REPORT.explanations[0]
    assert alternatives(found) == ""
    tied = replace(found, rivals=("router-no-renorm",), told_apart_by="layers.0.router.weights")
    said = " ".join(explanation(tied))
    assert "router-no-renorm" in said
    assert "layers.0.router.weights" in said
    assert "router-no-renorm" in alternatives(replace(tied, told_apart_by=""))


def test_an_explanation_says_where_it_acts() -> None:
    assert REPORT.explanations
    assert "calls of one token" in " ".join(explanation(replace(REPORT.explanations[0], where="calls of one token")))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://example.org/a?b=c#d", True), ("http://example.org", True), ("javascript:alert(1)", False),
        ("https://example.org/<b>", False), ('https://example.org/"x', False), ("https://example.org/a b", False),
        ("HTTPS", False), ("https://example.org/\u202e", False), ("", False), ("data:text/html,x", False),
    ],
)  # fmt: skip
def test_only_a_web_address_becomes_a_link(source: str, expected: bool) -> None:
    assert is_link(source) is expected


def test_an_error_is_a_number_only_beyond_what_is_allowed() -> None:
    assert [error_text(x) for x in (0.0, 0.97, 1.0, 1.001, 150.2, inf, nan)] == [
        "legal", "legal", "legal", "1.01x", "150x", "infinite", "-",
    ]  # fmt: skip


def test_what_comes_before_the_first_wrong_step() -> None:
    assert preceding(REPORT, "prefill", WRONG) == "everything before it passes (13 checks)"
    assert preceding(REPORT, "prefill", "embedding") == "it is the first check"
    assert preceding(REPORT, "decode2", "embedding") == "before it 86 pass, 1 undecidable, 3 fail"
    assert preceding(REPORT, "decode9", "embedding") == ""


def test_steps_are_counted_in_order_of_computation() -> None:
    steps = summarise_steps(replace(REPORT, checks=REPORT.checks[::-1]))
    assert [s.step for s in steps] == ["embedding", *LAYER_TAPS, "final_norm", "logits"]
    logits = next(s for s in steps if s.step == "router.logits")
    assert (logits.checks, logits.passed, logits.failed, logits.undecidable) == (6, 5, 1, 0)
    assert (logits.error, logits.excess, logits.excess_limit) == (214.0, 1003.0, 12.1)
    residual = next(s for s in steps if s.step == "residual")
    assert (residual.passed, residual.undecidable) == (5, 1)


def test_a_share_is_of_whichever_limit_is_nearer() -> None:
    assert share(replace(WRONG_CHECK, worst_error=0.5, excess=24.0, excess_limit=12.0)) == 2.0
    assert share(replace(WRONG_CHECK, worst_error=0.5, excess=3.0, excess_limit=12.0)) == 0.5
    assert share(replace(WRONG_CHECK, worst_error=nan, excess=3.0, excess_limit=12.0)) == 0.25
    assert share(replace(WRONG_CHECK, worst_error=0.5, excess=3.0, excess_limit=0.0)) == 0.5
    passes = replace(WRONG_CHECK, verdict=PASS, worst_error=0.97)
    assert share(replace(passes, excess=3.0, excess_limit=12.0)) == 0.25
    assert isnan(share(replace(passes, excess=0.0, excess_limit=0.0)))


def test_routing_is_counted_by_kind_and_by_what_it_means() -> None:
    routing = summarise_routing(REPORT)
    assert (routing.decisions, routing.kinds) == (36, {"forced": 32, "tie": 2, "contestable": 2})
    assert [(d.layer, d.token) for d in routing.illegal] == [(0, 11)]
    assert [(d.layer, d.token) for d in routing.deviating] == [(1, 1)]
    assert summarise_routing(sample_reports.undecidable()).absent == 4
