# SPDX-License-Identifier: Apache-2.0
"""SARIF 2.1.0, by which GitHub and editors show results at lines of source: a rule for each step, alerts of rules.

Source: OASIS, Static Analysis Results Interchange Format Version 2.1.0, Errata 01; and GitHub's page "SARIF support for
code scanning", which has the properties that GitHub needs and its limits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refmoe import __version__
from refmoe.engines.protocol import EVERY_TAP
from refmoe.report.sources import Place
from refmoe.report.wording import NOUNS, visible
from refmoe.verifier.subject import DIMENSIONS

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
ERROR, WARNING, NOTE = "error", "warning", "note"
LONGEST = 1024
"""Characters in a text of a rule: GitHub's limit."""

UNKNOWN, CRASHED, TIMED_OUT, BROKEN, CANNOT_JUDGE, LISTED = (
    "wrong-step", "crashed", "timed-out", "broken-answer", "cannot-judge", "known-failure-passes"
)  # fmt: skip
"""The rules that are about no step."""
OTHERS = {
    UNKNOWN: (ERROR, "A value is wrong", "The engine is not conformant, and no single step is named."),
    CRASHED: (ERROR, "The engine crashed", "The engine ended, or said that it failed, in place of an answer."),
    TIMED_OUT: (ERROR, "The engine gave no answer in time", "The engine was ended after the time for one request."),
    BROKEN: (ERROR, "The answer of the engine is broken", "The answer breaks the protocol, or its file is no trace."),
    CANNOT_JUDGE: (
        WARNING, "The engine cannot be judged", "Too few values have a bound, so nothing can be said about the engine.",
    ),
    LISTED: (
        WARNING, "A failure that is listed as known no longer fails",
        "The case is conformant, and the file of known failures lists it. Take the entry out.",
    ),
}  # fmt: skip
"""Per rule its level, and what it means in short and in full."""

SPECIFIED = {
    "embedding": "model", "attention_norm": "norm", "attention.q": "attention", "attention.k": "attention",
    "attention.v": "attention", "attention.q_rope": "rope", "attention.k_rope": "rope", "attention.scores": "attention",
    "attention.probs": "softmax", "attention.context": "attention", "attention.output": "attention",
    "attention_residual": "model", "moe_norm": "norm", "router.logits": "router", "router.experts": "router",
    "router.weights": "softmax", "expert.gate": "experts", "expert.up": "experts", "expert.hidden": "experts",
    "expert.output": "experts", "moe.output": "experts", "residual": "model", "final_norm": "norm", "logits": "model",
}  # fmt: skip
"""Per tap of the model the file of `refmoe/spec` that states its step."""


@dataclass(frozen=True)
class Alert:
    """One result."""

    rule: str
    """A step, or one of `OTHERS`."""
    message: str
    place: Place
    within: str
    """The place in the engine's computation, such as ``one-pair/float32/prefill/layers.0.router.logits``."""
    identity: Sequence[str]
    """Tells it from other alerts of its rule, in this run and in all others: no number that a run changes."""
    known: str | None = None
    """The reason why the failure is known; None where it is not."""
    properties: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Log:
    """A run of refmoe, as a file of SARIF tells it."""

    category: str
    """Tells the runs of one repository apart: GitHub keeps the alerts of the last run in each category."""
    alerts: Sequence[Alert]
    notes: Sequence[str]
    """Sentences that are no alert, such as cases that were skipped."""
    home: str | None = None
    """``OWNER/REPOSITORY[@REF]`` of refmoe on GitHub, for links from rules to the specification."""


def rule_of(step: str) -> str:
    """The rule of a wrong step. A step without a name of the specification has a rule with all others."""
    return step if step in EVERY_TAP else UNKNOWN


def level(rule: str) -> str:
    """The level of a rule."""
    return OTHERS[rule][0] if rule in OTHERS else ERROR


def to_sarif(log: Log) -> str:
    """The file as text. Equal logs give equal text."""
    rules = [*EVERY_TAP, *OTHERS]
    driver: dict[str, Any] = {"name": "refmoe", "version": __version__, "semanticVersion": __version__}
    if log.home is not None:
        driver["informationUri"] = f"https://github.com/{log.home.partition('@')[0]}"
    driver["rules"] = [_rule(rule, log.home) for rule in rules]
    notifications = [{"level": NOTE, "message": {"text": _message(note)}} for note in log.notes]
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"refmoe/{_name(log.category)}/"},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notifications}],
        "results": [_result(alert, rules.index(alert.rule)) for alert in log.alerts],
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False) + "\n"


# ---- rules


def _rule(rule: str, home: str | None) -> dict[str, Any]:
    if rule in OTHERS:
        short, full = OTHERS[rule][1:]
        file, page, kind = None, "docs/reading-a-report.md", "Verdict"
    else:
        noun = NOUNS[rule]
        short = f"{noun[:1].upper()}{noun[1:]} is wrong"
        full = (
            f"A value of {rule} [{', '.join(DIMENSIONS[rule])}] is not one that the policy of the engine can produce."
        )
        file = f"refmoe/spec/{SPECIFIED[rule]}.py" if rule in SPECIFIED else None
        page, kind = file or "golden/FORMAT.md", "Step"
    told = f"The specification states the step in {file}. " if file else ""
    how = "The message has the case, the call, the layer and the token, and the known bug where one explains all of it."
    found: dict[str, Any] = {
        "id": rule,
        "name": "".join(part[:1].upper() + part[1:] for part in re.split(r"[._-]", rule)) + kind,
        "shortDescription": {"text": _message(f"{short}.")[:LONGEST]},
        "fullDescription": {"text": _message(full)[:LONGEST]},
        "help": {"text": f"{told}{how}"},
        "defaultConfiguration": {"level": level(rule)},
        "properties": {
            "tags": ["correctness", "conformance"], "precision": "very-high", "problem.severity": level(rule),
        },
    }  # fmt: skip
    if home is not None:
        found["helpUri"] = link(home, page)
    return found


def link(home: str, page: str) -> str:
    """The address of a file of refmoe on GitHub.   home: ``OWNER/REPOSITORY[@REF]``"""
    repository, _, ref = home.partition("@")
    return f"https://github.com/{repository}/blob/{ref or 'HEAD'}/{page}"


# ---- results


def _result(alert: Alert, index: int) -> dict[str, Any]:
    place = alert.place
    region = {"startLine": place.line, "startColumn": 1, "endLine": place.line, "endColumn": place.end}
    reason = [] if alert.known is None else [_message(alert.known)]
    return {
        "ruleId": alert.rule,
        "ruleIndex": index,
        "level": level(alert.rule),
        "message": {"text": _message(alert.message)},
        "locations": [{
            "physicalLocation": {"artifactLocation": {"uri": place.uri}, "region": region},
            "logicalLocations": [{"fullyQualifiedName": visible(alert.within), "kind": "variable"}],
        }],
        "partialFingerprints": {"primaryLocationLineHash": f"{_digest(alert)}:1"},
        "suppressions": [{"kind": "external", "status": "accepted", "justification": text} for text in reason],
        "properties": {name: visible(x) if isinstance(x, str) else x for name, x in alert.properties.items()},
    }  # fmt: skip


def _digest(alert: Alert) -> str:
    return hashlib.sha256("\0".join((alert.rule, *alert.identity)).encode(errors="backslashreplace")).hexdigest()[:16]


def _message(text: str) -> str:
    """A text in which SARIF finds neither a link, which it writes in brackets, nor a placeholder, in braces."""
    return visible(" ".join(text.split())).translate(str.maketrans("[]{}", "()()"))


def _name(text: str) -> str:
    """A text as part of an identifier in which a slash has a meaning."""
    return re.sub(r"[^\w. =-]", "-", text, flags=re.ASCII)
