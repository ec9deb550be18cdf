# SPDX-License-Identifier: Apache-2.0
"""A verification as JSON: valid, complete, and as its schema says."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import jsonschema
import pytest

from refmoe.report.verification_json import schema, to_json
from refmoe.verifier.findings import Check, ContestableCode, Decision, Element, Explanation, Report
from tests.report.sample_reports import SMALL, failing, hostile, not_finite, quantised


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def parsed(report: Report) -> Any:
    return json.loads(to_json(report), parse_constant=refuse)


def validator() -> Any:
    document = schema()
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


@pytest.mark.parametrize("name", SMALL)
def test_every_report_satisfies_the_schema(name: str) -> None:
    validator().validate(parsed(SMALL[name]()))


def restored(document: dict[str, Any]) -> Report:
    def numbers(kind: type, value: dict[str, Any]) -> dict[str, Any]:
        reals = {field.name for field in fields(kind) if field.type == "float"}
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return {k: float(v) if k in reals else v for k, v in lists.items()}

    checks = []
    for entry in document.pop("checks"):
        worst = entry.pop("worst")
        element = None if worst is None else Element(**numbers(Element, worst))
        checks.append(Check(**numbers(Check, entry), worst=element))
    decisions = [Decision(**numbers(Decision, entry)) for entry in document.pop("decisions")]
    codes = [ContestableCode(**numbers(ContestableCode, entry)) for entry in document.pop("codes")]
    document.pop("format_version")
    if document["explanations"] is not None:
        document["explanations"] = tuple(
            Explanation(**numbers(Explanation, entry)) for entry in document.pop("explanations")
        )
    return Report(**numbers(Report, document), checks=tuple(checks), decisions=tuple(decisions), codes=tuple(codes))


@pytest.mark.parametrize("name", SMALL)
def test_nothing_is_lost(name: str) -> None:
    report = SMALL[name]()
    assert repr(restored(parsed(report))) == repr(report)  # by repr, since NaN is not equal to itself


def test_fields_are_those_of_the_findings_and_each_is_documented() -> None:
    document, described = parsed(failing()), schema()
    places = (
        (Report, document, described),
        (Check, document["checks"][0], described["$defs"]["check"]),
        (Decision, document["decisions"][0], described["$defs"]["decision"]),
        (ContestableCode, parsed(quantised())["codes"][0], described["$defs"]["code"]),
        (Explanation, document["explanations"][0], described["$defs"]["explanation"]),
        (Element, next(c["worst"] for c in document["checks"] if c["worst"]), described["$defs"]["element"]),
    )
    for kind, value, definition in places:
        names = [field.name for field in fields(kind)]
        assert [key for key in value if key != "format_version"] == names
        assert [key for key in definition["properties"] if key != "format_version"] == names
        assert set(definition["required"]) == set(definition["properties"])
        undocumented = [k for k, v in definition["properties"].items() if not ("description" in v or "enum" in v)]
        assert undocumented == []


def test_what_is_not_finite_has_a_name() -> None:
    text = to_json(not_finite())
    assert '"worst_error": "NaN"' in text
    assert '"high": "Infinity"' in text
    assert '"low": "-Infinity"' in text


def test_the_schema_refuses_what_is_wrong() -> None:
    good, checker = parsed(failing()), validator()
    for change in (
        {"verdict": "fine"}, {"significance": "NaN"}, {"first_wrong": ["prefill"]}, {"format_version": "1"},
        {"surplus": 1}, {"checks": [good["checks"][0] | {"rung": "none"}]}, {"missing": [1]},
        {"checks": [good["checks"][0] | {"worst_error": None}]}, {"decisions": [good["decisions"][0] | {"token": -1}]},
    ):  # fmt: skip
        assert list(checker.iter_errors(good | change)), change
    for name in good:
        assert list(checker.iter_errors({key: value for key, value in good.items() if key != name})), name


def test_each_check_and_decision_is_a_line_and_hostile_names_stay_strings() -> None:
    lines = to_json(failing()).splitlines()
    assert sum(line.startswith('  {"run"') for line in lines) == 135 + 36
    assert parsed(hostile())["producer"] == hostile().producer
