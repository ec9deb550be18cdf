# SPDX-License-Identifier: Apache-2.0
"""The report as a value: its truth, its texts, its records, its files."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

import refmoe
from refmoe import InputError
from refmoe.report.verification_json import schema
from tests.report.sarif_checks import github_faults, schema_faults

TOKENS = [1, 31, 41]


@pytest.fixture(scope="module")
def model() -> refmoe.Model:
    return refmoe.load("walking-skeleton")


@pytest.fixture(scope="module")
def right(model: refmoe.Model) -> refmoe.Report:
    return refmoe.verify(model.run(TOKENS, dtype="float32"), model)


@pytest.fixture(scope="module")
def wrong(model: refmoe.Model) -> refmoe.Report:
    """The values after the first mixture of experts lack the norm before the router."""
    trace = model.run(TOKENS, dtype="float32")
    values = {tap: trace["prefill", tap] for tap in trace["prefill"]}
    values["layers.0.attention.q_rope"] = values["layers.0.attention.q_rope"][:, ::-1]
    return refmoe.verify(values, model, TOKENS, policy="float32")


def test_its_truth_is_conformance(right: refmoe.Report, wrong: refmoe.Report) -> None:
    assert bool(right)
    assert not wrong
    assert (right.verdict, wrong.verdict) == ("conformant", "not conformant")


def test_an_engine_that_cannot_be_judged_is_not_conformant(model: refmoe.Model) -> None:
    """Logits alone, of two layers whose choice of experts rounding decides, or whose dtype overflows."""
    case = refmoe.case("huge-activations")
    trace = case.model.run(policy="float16", taps="logits")
    report = refmoe.verify(trace, case, policy="float16")
    assert report.verdict == "cannot judge"
    assert not report


def test_the_first_wrong_step_and_its_explanation(right: refmoe.Report, wrong: refmoe.Report) -> None:
    assert right.first_wrong_step is None
    assert right.explanations == ()
    assert wrong.first_wrong_step is not None
    assert (wrong.first_wrong_step.run, wrong.first_wrong_step.tap) == ("prefill", "layers.0.attention.q_rope")
    assert wrong.first_wrong_step.worst is not None
    assert wrong.explanations[0].explains


def test_a_verification_diagnoses_unless_asked_not_to(model: refmoe.Model, wrong: refmoe.Report) -> None:
    values = {"logits": model.run(TOKENS)["prefill", "logits"] * 1.01}
    report = refmoe.verify(values, model, TOKENS, policy="float32", diagnose=False)
    assert report.findings.explanations is None
    assert wrong.findings.explanations is not None


def test_checks_are_plain_records(wrong: refmoe.Report) -> None:
    failed = [check for check in wrong.checks if check.verdict == "fail"]
    assert wrong.first_wrong_step == failed[0]
    assert {check.layer for check in wrong.checks} == {None, 0, 1}


def test_its_text_is_that_of_the_terminal(wrong: refmoe.Report) -> None:
    text = str(wrong)
    assert text.splitlines()[0] == "NOT CONFORMANT"
    assert "layers.0.attention.q_rope" in text
    assert "\x1b" not in text


def test_its_dictionary_is_the_json_of_the_command_line(right: refmoe.Report, wrong: refmoe.Report) -> None:
    for report in (right, wrong):
        values = report.to_dict()
        jsonschema.validate(values, schema())
        assert values["verdict"] == report.verdict
        assert len(values["checks"]) == len(report.checks)
        json.dumps(values, allow_nan=False)


def test_its_files(wrong: refmoe.Report, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    wrong.html(tmp_path / "a.html")
    wrong.html(str(tmp_path / "b.html"))
    wrong.junit(str(tmp_path / "c.xml"))
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    assert "layers.0.attention.q_rope" in (tmp_path / "a.html").read_text()
    assert ElementTree.parse(tmp_path / "c.xml").getroot().tag == "testsuites"


def test_its_alert_at_a_line(
    right: refmoe.Report, wrong: refmoe.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rope.py").write_text("import math\n\ndef rotate(x):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    sources = ["attention.q_rope=rope.py:def rotate", "rope.py"]
    for report, places in ((right, []), (wrong, [("rope.py", 3)])):
        report.sarif("a.sarif", sources)
        text = (tmp_path / "a.sarif").read_text()
        log = json.loads(text)
        assert schema_faults(log) == github_faults(text) == []
        found = [each["locations"][0]["physicalLocation"] for each in log["runs"][0]["results"]]
        assert [(each["artifactLocation"]["uri"], each["region"]["startLine"]) for each in found] == places


@pytest.mark.parametrize("sources", ["rope.py", None, 3, [3], [b"rope.py"], ["none.py"], [], ["logits=rope.py"]])
def test_a_source_that_is_none(wrong: refmoe.Report, tmp_path: Path, sources: Any) -> None:
    with pytest.raises(InputError):
        wrong.sarif(tmp_path / "a.sarif", sources)
    with pytest.raises(InputError):
        wrong.sarif(tmp_path / "a.sarif", [__file__], refmoe_from="refmoe")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("path", ["", "folder", "missing/a", "nul\0", 3, None, b"bytes", "a" * 5000])
@pytest.mark.parametrize("kind", ["html", "junit"])
def test_a_path_that_cannot_be_written(wrong: refmoe.Report, tmp_path: Path, kind: str, path: Any) -> None:
    (tmp_path / "folder").mkdir()
    given = str(tmp_path / path) if isinstance(path, str) and path else path
    with pytest.raises(InputError):
        getattr(wrong, kind)(given)
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_a_notebook_shows_the_page_in_a_frame(wrong: refmoe.Report) -> None:
    pytest.importorskip("jinja2")
    frame = wrong._repr_html_()
    assert frame.startswith("<iframe")
    assert "layers.0.attention.q_rope" in frame
    assert "<script>" not in frame  # escaped: it belongs to the frame


def test_a_notebook_without_jinja_shows_the_text(wrong: refmoe.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    true_import = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "jinja2":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return true_import(name, *arguments, **keywords)

    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    monkeypatch.setattr(builtins, "__import__", without)
    assert wrong._repr_html_().startswith("<pre>NOT CONFORMANT")


def test_representations_are_one_short_line(model: refmoe.Model, right: refmoe.Report, wrong: refmoe.Report) -> None:
    for value in (model, model.run(TOKENS), right, wrong, refmoe.case("top-1")):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 250
        assert repr(value).startswith("<refmoe")
