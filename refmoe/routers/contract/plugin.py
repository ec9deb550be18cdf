"""The pytest plugin, by entry point: an option, the fixture `router_law`, and a line in the summary.

PYTEST_DONT_REWRITE. It is loaded in every pytest run of an environment that has refmoe, so it imports nothing but
pytest; the laws, NumPy and Hypothesis come in when a test asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refmoe.routers.contract.pytest_items import RouterLaw

NOTE = "router contract"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many examples each law is tried on."""
    group = parser.getgroup("refmoe", "the contract of routers (refmoe.routers.contract)")
    group.addoption(
        "--router-examples", dest="router_examples", type=int, default=200, metavar="N",
        help="examples per law of a router's contract (200)",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `router_law` becomes one item per law."""
    if "router_law" in metafunc.fixturenames:
        from refmoe.routers.contract.laws import LAWS

        metafunc.parametrize("router_law", list(LAWS.values()), ids=list(LAWS), indirect=True)


@pytest.fixture
def router_law(request: pytest.FixtureRequest) -> RouterLaw:
    """One law of routing: ``router_law.check(router, Declaration(...))`` passes, fails or skips the test by it."""
    from refmoe.routers.contract.pytest_items import RouterLaw

    return RouterLaw(request.param, request)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which tie rule the routers of this run seem to follow."""
    lines = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            lines += [f"{report.nodeid}: {words}" for name, words in report.user_properties if name == NOTE]
    if lines:
        terminalreporter.section("router contract")
        for line in lines:
            terminalreporter.write_line(line)
