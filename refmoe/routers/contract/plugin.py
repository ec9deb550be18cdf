# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, by entry point: an option, the fixture `router_law`, and a line in the summary.

PYTEST_DONT_REWRITE. Every pytest run of an environment with refmoe loads it, so it imports only pytest. The laws, NumPy
and Hypothesis are imported when a test asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refmoe.routers.contract.pytest_items import RouterLaw

NOTE = "contract"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the number of examples per law."""
    group = parser.getgroup("refmoe", "the contracts of routers and kernels")
    group.addoption(
        "--contract-examples", "--router-examples", dest="contract_examples", type=int, default=None, metavar="N",
        help="examples per law of a contract (a router: 200, a kernel: 100)",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test that takes `router_law` one item per law."""
    if "router_law" in metafunc.fixturenames:
        from refmoe.routers.contract.laws import LAWS

        metafunc.parametrize("router_law", list(LAWS.values()), ids=list(LAWS), indirect=True)


def _router_law(request: pytest.FixtureRequest) -> RouterLaw:
    """One law of routing: ``router_law.check(router, Declaration(...))`` passes, fails or skips the test by it."""
    from refmoe.routers.contract.pytest_items import RouterLaw

    return RouterLaw(request.param, request)


# no decorator, so that mypy accepts this function where pytest is not installed
router_law = pytest.fixture(_router_law, name="router_law")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tie rule that each router of this run seems to follow."""
    lines = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            lines += [f"{report.nodeid}: {words}" for name, words in report.user_properties if name == NOTE]
    if lines:
        terminalreporter.section("router contract")
        for line in lines:
            terminalreporter.write_line(line)
