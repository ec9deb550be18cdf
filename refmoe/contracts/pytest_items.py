# SPDX-License-Identifier: Apache-2.0
"""Laws as pytest items: a class with one test method per law."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from refmoe.contracts.checking import Verdict, judge
from refmoe.contracts.law import Contract, Law, Subject
from refmoe.contracts.report import explain

NOTE = "contract"
"""The name of the user property of an item that the terminal summary prints."""


def test_class(contract: Contract, subject: Subject, function: object) -> type:
    """A class with a test per law of the contract.   function: that is tested, for its name"""
    methods = {f"test_{law.name.replace('-', '_').lower()}": method(law, subject) for law in contract.laws.values()}
    name = getattr(function, "__name__", type(function).__name__)
    words = f"The laws of a {contract.subject}, for {name}."
    title = f"{contract.subject.title().replace(' ', '')}Contract"
    return type(title, (), {"__doc__": words, "subject": subject, **methods})


def method(law: Law, subject: Subject) -> Callable[..., None]:
    """A law as a test method."""

    def test(self: object, request: pytest.FixtureRequest) -> None:
        run(law, subject, request)

    test.__doc__ = law.words
    return test


def run(law: Law, subject: Subject, request: pytest.FixtureRequest) -> None:
    """Judge the law: pass, fail in words, or skip with the reason."""
    verdict = judge(law, subject, request.config.getoption("contract_examples", None))
    report(verdict, request.node)


def report(verdict: Verdict, node: pytest.Item) -> None:
    if verdict.law.note and verdict.outcome in ("pass", "fail"):
        node.user_properties.append((NOTE, verdict.words))
    if verdict.outcome == "fail":
        pytest.fail(explain(verdict), pytrace=False)
    if verdict.outcome != "pass":
        pytest.skip(verdict.words)
