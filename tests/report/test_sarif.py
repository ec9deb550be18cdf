# SPDX-License-Identifier: Apache-2.0
"""SARIF: valid, as GitHub needs it, and with the alerts of exactly the failures."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from docs.bookmaker.spec_pages import pages
from refmoe.engines.known import KnownFailure, sort_failures
from refmoe.engines.protocol import EVERY_TAP, TAPS
from refmoe.engines.quantised import FORMS
from refmoe.engines.results import Results
from refmoe.report.conform_sarif import run_sarif
from refmoe.report.sarif import OTHERS, SPECIFIED
from refmoe.report.sources import Place, Sources
from refmoe.report.verification_sarif import verification_sarif
from tests.engines.test_results import OUTCOMES, RESULTS, known, outcome
from tests.report.sample_reports import SAMPLES, failing
from tests.report.sarif_checks import github_faults, schema_faults
from tests.tour import ROOT

REST = Place("src/engine.cpp", 1, 10)
SOURCES = Sources({"attention.q_rope": Place("src/rope.cpp", 41, 30)}, REST)
HOME = "someone/refmoe@v0"
VALIDATOR = ROOT / "build" / "node_modules" / "@microsoft" / "sarif-multitool-linux" / "Sarif.Multitool"


def run_of(results: Results, *listed: KnownFailure, home: str | None = HOME) -> Any:
    """The run in the file of results, which is valid."""
    text = run_sarif(results, sort_failures(results, listed), SOURCES, home)
    log = json.loads(text)
    assert schema_faults(log) == []
    assert github_faults(text) == []
    (run,) = log["runs"]
    return run


def test_an_alert_for_each_failure_at_its_line() -> None:
    """The outcomes of the sample: conformant, wrong at a step, skipped, crashed, undecided, timed out."""
    run = run_of(RESULTS)
    found = {(each["properties"]["case"], each["properties"]["dtype"]): each for each in run["results"]}
    assert {place: (each["ruleId"], each["level"]) for place, each in found.items()} == {
        ("one", "bfloat16"): ("attention.q_rope", "error"),
        ("two", "bfloat16"): ("crashed", "error"),
        ("three", "float32"): ("cannot-judge", "warning"),
        ("three", "bfloat16"): ("timed-out", "error"),
    }
    wrong = found["one", "bfloat16"]
    assert wrong["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "src/rope.cpp"},
        "region": {"startLine": 41, "startColumn": 1, "endLine": 41, "endColumn": 30},
    }
    assert wrong["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == (
        "one/bfloat16/decode1/layers.1.attention.q_rope"
    )
    facts = wrong["properties"]
    assert (facts["run"], facts["layer"], facts["explanation"]) == ("decode1", 1, "rope-sign-flipped")
    for words in ("3 of 9 values lie outside", "rope-sign-flipped", "flip the sign", "layer 1"):
        assert words in wrong["message"]["text"]
    others = [each for place, each in found.items() if place != ("one", "bfloat16")]
    assert {each["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for each in others} == {REST.uri}


def test_the_token_is_told_where_it_is_known() -> None:
    outcomes = tuple(replace(each, token=7 if each.first_wrong else None) for each in OUTCOMES)
    (wrong, *others) = run_of(replace(RESULTS, outcomes=outcomes))["results"]
    assert wrong["properties"]["token"] == 7
    assert "token 7" in wrong["message"]["text"]
    assert all("token" not in each["properties"] for each in others)


def test_a_conformant_engine_has_no_alert_and_nothing_is_hidden() -> None:
    run = run_of(replace(RESULTS, outcomes=(OUTCOMES[0], OUTCOMES[2])))
    assert run["results"] == []
    said = " ".join(each["message"]["text"] for each in run["invocations"][0]["toolExecutionNotifications"])
    assert "two in float32" in said
    assert "skipped" in said


def test_known_failures_are_suppressed_and_those_that_pass_are_not() -> None:
    listed = known("one bfloat16", "one float32", "two float32")
    run = run_of(RESULTS, *listed)
    by_rule = {each["ruleId"]: each for each in run["results"]}
    suppressed = {rule: [x["justification"] for x in each["suppressions"]] for rule, each in by_rule.items()}
    assert suppressed == {
        "attention.q_rope": ["a reason"], "crashed": [], "cannot-judge": [], "timed-out": [],
        "known-failure-passes": [],
    }  # fmt: skip
    assert by_rule["known-failure-passes"]["level"] == "warning"
    assert by_rule["known-failure-passes"]["properties"] == {"case": "one", "dtype": "float32"}


def test_a_fingerprint_stays_while_numbers_change() -> None:
    """Of the same failure in another run, at another line; another case, dtype or engine has another one."""

    def prints(results: Results, sources: Sources) -> dict[tuple[str, str], str]:
        log = json.loads(run_sarif(results, sort_failures(results, ()), sources))
        return {
            (each["properties"]["case"], each["properties"]["dtype"]):
                each["partialFingerprints"]["primaryLocationLineHash"]
            for each in log["runs"][0]["results"]
        }  # fmt: skip

    first = prints(RESULTS, SOURCES)
    moved = Sources({"attention.q_rope": Place("src/rope.cpp", 99, 3)}, REST)
    changed = replace(
        RESULTS,
        outcomes=tuple(replace(x, reason=f"{x.reason}, 4.5", token=3, explanations=()) for x in OUTCOMES),
        engine=replace(RESULTS.engine, version="1.1"), significance=1e-9,
    )  # fmt: skip
    assert prints(changed, moved) == first
    assert len({*first.values()}) == len(first)
    renamed = prints(replace(RESULTS, engine=replace(RESULTS.engine, name="another")), SOURCES)
    assert not {*renamed.values()} & {*first.values()}


def test_engines_with_other_options_are_kept_apart() -> None:
    """GitHub replaces the alerts of a category by those of the next run, which may be of another version."""

    def category(**fields: Any) -> str:
        return str(run_of(replace(RESULTS, engine=replace(RESULTS.engine, **fields)))["automationDetails"]["id"])

    assert category(options={"attention": "eager"}) != category(options={"attention": "sdpa"})
    assert category(version="1.1") == category(version="1.0")
    assert category(options={"command": "/tmp/x"}) == category(options={})
    with_formats = {run_of(replace(RESULTS, quantised=form))["automationDetails"]["id"] for form in ("", *FORMS)}
    assert len(with_formats) == 1 + len(FORMS)


def test_each_step_has_a_rule_and_a_link_to_its_specification() -> None:
    run = run_of(RESULTS)
    driver = run["tool"]["driver"]
    assert [rule["id"] for rule in driver["rules"]] == [*EVERY_TAP, *OTHERS]
    for rule in driver["rules"]:
        base, found, path = rule["helpUri"].partition("/blob/v0/")
        assert (base, found) == ("https://github.com/someone/refmoe", "/blob/v0/")
        assert (ROOT / path).is_file()
    without = run_of(RESULTS, home=None)["tool"]["driver"]
    assert not any("helpUri" in rule for rule in without["rules"])
    assert "informationUri" not in without


def test_the_file_of_a_step_is_the_one_that_offers_its_tap() -> None:
    """The book finds the functions of a tap in the source of the specification."""
    offered = {
        tap: {function.file for step in pages(ROOT / "refmoe") if tap in step.taps for function in step.functions}
        for tap in TAPS
    }
    assert {*SPECIFIED} == {*TAPS}
    assert {tap: file for tap, file in SPECIFIED.items() if f"{file}.py" not in offered[tap]} == {}


# ---- strangers


def test_texts_of_strangers_stay_texts() -> None:
    """SARIF reads a link in brackets and a placeholder in braces; an escape sequence would act on a terminal."""
    odd = "[click](http://evil) {0} \x1b[31m \ud800 \u202e </script>"
    outcomes = (
        outcome(odd, "float32", "not conformant", odd, first_wrong=(odd, "logits")),
        outcome("b", "float32", "crashed", odd, explanations=()),
    )
    results = replace(RESULTS, outcomes=outcomes, engine=replace(RESULTS.engine, name=odd, version=odd), notes=(odd,))
    run = run_of(results)
    messages = [each["message"]["text"] for each in run["results"]]
    messages += [each["message"]["text"] for each in run["invocations"][0]["toolExecutionNotifications"]]
    assert all(text.isprintable() and not {*text} & {*"[]{}"} for text in messages)
    assert "/" not in run["automationDetails"]["id"].removeprefix("refmoe/").removesuffix("/")


# ---- a verification


@pytest.mark.parametrize("name", SAMPLES)
def test_a_verification_is_valid_whatever_it_says(name: str) -> None:
    report = SAMPLES[name]()
    text = verification_sarif(report, SOURCES, HOME)
    assert schema_faults(json.loads(text)) == []
    assert github_faults(text) == []
    results = json.loads(text)["runs"][0]["results"]
    assert bool(results) == (report.verdict != "conformant")


def test_a_verification_shows_its_first_wrong_step() -> None:
    report = failing()
    (alert,) = json.loads(verification_sarif(report, Sources({"router.logits": REST}, REST)))["runs"][0]["results"]
    assert (alert["ruleId"], alert["properties"]["tap"], alert["properties"]["token"]) == (
        "router.logits", "layers.0.router.logits", 11
    )  # fmt: skip


# ---- the checks themselves

BROKEN: dict[str, Callable[[Any], Any]] = {
    "no schema": lambda log: log.pop("$schema"),
    "another version": lambda log: log.update(version="2.0.0"),
    "no rules": lambda log: log["runs"][0]["tool"]["driver"].pop("rules"),
    "a long text": lambda log: log["runs"][0]["tool"]["driver"]["rules"][0]["shortDescription"].update(text="x" * 2000),
    "no help": lambda log: log["runs"][0]["tool"]["driver"]["rules"][0].pop("help"),
    "no location": lambda log: log["runs"][0]["results"][0].update(locations=[]),
    "an absolute place": lambda log: _place(log)["artifactLocation"].update(uri="/home/me/x.cpp"),
    "no column": lambda log: _place(log)["region"].pop("endColumn"),
    "no fingerprint": lambda log: log["runs"][0]["results"][0].pop("partialFingerprints"),
    "equal alerts": lambda log: log["runs"][0]["results"].append(log["runs"][0]["results"][0]),
    "another rule": lambda log: log["runs"][0]["results"][0].update(ruleIndex=3),
    "no message": lambda log: log["runs"][0]["results"][0].update(message={"text": ""}),
}
SCHEMA_BROKEN: dict[str, Callable[[Any], Any]] = {
    "an unknown property": lambda log: log.update(results=[]),
    "an unknown level": lambda log: log["runs"][0]["results"][0].update(level="fatal"),
    "a line 0": lambda log: _place(log)["region"].update(startLine=0),
    "a suppression of no kind": lambda log: log["runs"][0]["results"][0].update(suppressions=[{"status": "accepted"}]),
}


def _place(log: Any) -> Any:
    return log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]


@pytest.mark.parametrize("name", [*BROKEN, *SCHEMA_BROKEN])
def test_the_checks_find_what_is_broken(name: str) -> None:
    log = json.loads(run_sarif(RESULTS, sort_failures(RESULTS, ()), SOURCES, HOME))
    (BROKEN | SCHEMA_BROKEN)[name](log)
    assert github_faults(json.dumps(log)) if name in BROKEN else schema_faults(log)


def test_microsofts_validator_has_nothing_against_a_file(tmp_path: Path) -> None:
    """It knows the rules of the format that no schema can say, and those of GitHub."""
    if not VALIDATOR.is_file():
        pytest.skip(f"no {VALIDATOR.name}: npm install --no-save --prefix build @microsoft/sarif-multitool-linux")
    VALIDATOR.chmod(0o755)  # npm leaves it as it is in the package
    said = {}
    text = run_sarif(RESULTS, sort_failures(RESULTS, known("one bfloat16", "one float32")), SOURCES, HOME)
    for name, content in {"right": text, "wrong": text.replace("EmbeddingStep", "embedding")}.items():
        file, out = tmp_path / f"{name}.sarif", tmp_path / f"{name}.out"
        file.write_text(content)
        words = [VALIDATOR, "validate", file, "--rule-kind", "Sarif;Ghas", "--output", out]
        variables = {**os.environ, "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1"}
        subprocess.run(words, env=variables, capture_output=True, check=False)
        said[name] = json.loads(out.read_text(encoding="utf-8-sig"))["runs"][0]["results"]
    assert said["right"] == []
    assert said["wrong"]


def test_equal_results_give_equal_text() -> None:
    texts = {run_sarif(RESULTS, sort_failures(RESULTS, ()), SOURCES, HOME) for _ in range(2)}
    assert len(texts) == 1
