# SPDX-License-Identifier: Apache-2.0
"""Laws as pytest items: a class with one test method per law, or one parameter per law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from refmoe.routers.contract.checking import EXAMPLES, Verdict, judge
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.law import Law
from refmoe.routers.contract.laws import LAWS
from refmoe.routers.contract.report import explain
from refmoe.routers.contract.subject import Router, Subject

NOTE = "router contract"
"""The name of the user property of an item that the terminal summary prints."""


def contract(router: Router, declaration: Declaration, **parts: Any) -> type:
    """A test class with one test per law: ``TestMyRouter = contract(my_router, Declaration(experts=8, top_k=2))``.

    parts: with_top_k, dispatch, combine, balance_loss, z_loss, balanced; see `Subject`.
    """
    subject = Subject(router, declaration, **parts)
    methods = {f"test_{law.name.replace('-', '_').lower()}": method(law, subject) for law in LAWS.values()}
    name = getattr(router, "__name__", type(router).__name__)
    return type("RouterContract", (), {"__doc__": f"The laws of routing, for {name}.", "subject": subject, **methods})


def method(law: Law, subject: Subject) -> Callable[..., None]:
    """A law as a test method."""

    def test(self: object, request: pytest.FixtureRequest) -> None:
        run(law, subject, request)

    test.__doc__ = law.words
    return test


def run(law: Law, subject: Subject, request: pytest.FixtureRequest) -> None:
    """Judge the law: pass, fail in words, or skip with the reason."""
    verdict = judge(law, subject, request.config.getoption("router_examples", EXAMPLES))
    report(verdict, request.node)


def report(verdict: Verdict, node: pytest.Item) -> None:
    if verdict.law.note and verdict.outcome in ("pass", "fail"):
        node.user_properties.append((NOTE, verdict.words))
    if verdict.outcome == "fail":
        pytest.fail(explain(verdict), pytrace=False)
    if verdict.outcome != "pass":
        pytest.skip(verdict.words)


class RouterLaw:
    """The value of the fixture `router_law`: one law, which can be checked for a router."""

    def __init__(self, law: Law, request: pytest.FixtureRequest) -> None:
        self.law = law
        self._request = request

    def check(self, router: Router, declaration: Declaration, **parts: Any) -> None:
        """Pass, fail or skip this test by this law."""
        run(self.law, Subject(router, declaration, **parts), self._request)
