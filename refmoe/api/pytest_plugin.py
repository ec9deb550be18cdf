# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, by entry point: the fixture `refmoe_case` and its marker.

PYTEST_DONT_REWRITE. Every pytest run of an environment with refmoe loads it, so it imports only pytest. The cases are
read when a test asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refmoe.api.models import GoldenCase

MARKER = "refmoe_cases"


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, which strict runs need."""
    config.addinivalue_line(
        "markers", f"{MARKER}(*names): the cases of the fixture refmoe_case; without it all small ones"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test that takes `refmoe_case` one item per case."""
    if "refmoe_case" not in metafunc.fixturenames:
        return
    import refmoe
    from refmoe.api.models import small_cases

    marker = metafunc.definition.get_closest_marker(MARKER)
    try:
        names = [refmoe.case(name).name for name in marker.args] if marker is not None else small_cases()
    except refmoe.InputError as error:
        raise pytest.UsageError(f"@pytest.mark.{MARKER}: {error}") from None
    metafunc.parametrize("refmoe_case", names, indirect=True)


def _refmoe_case(request: pytest.FixtureRequest) -> GoldenCase:
    """A golden case, as `refmoe.case` gives it: its model, its calls and its golden taps."""
    import refmoe

    return refmoe.case(request.param)


# no decorator, so that mypy accepts this function where pytest is not installed
refmoe_case: Any = pytest.fixture(_refmoe_case, name="refmoe_case")
