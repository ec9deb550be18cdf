# SPDX-License-Identifier: Apache-2.0
"""Laws as pytest items: a class with one test method per law, or one parameter per law."""

from __future__ import annotations

from typing import Any

import pytest

from refmoe.contracts.law import Law
from refmoe.contracts.pytest_items import run, test_class
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.law import CONTRACT
from refmoe.routers.contract.laws import LAWS
from refmoe.routers.contract.subject import Router, Subject

assert LAWS is CONTRACT.laws


def contract(router: Router, declaration: Declaration, **parts: Any) -> type:
    """A test class with one test per law: ``TestMyRouter = contract(my_router, Declaration(experts=8, top_k=2))``.

    parts: with_top_k, dispatch, combine, balance_loss, z_loss, balanced; see `Subject`.
    """
    return test_class(CONTRACT, Subject(router, declaration, **parts), router)


class RouterLaw:
    """The value of the fixture `router_law`: one law, which can be checked for a router."""

    def __init__(self, law: Law, request: pytest.FixtureRequest) -> None:
        self.law = law
        self._request = request

    def check(self, router: Router, declaration: Declaration, **parts: Any) -> None:
        """Pass, fail or skip this test by this law."""
        run(self.law, Subject(router, declaration, **parts), self._request)
