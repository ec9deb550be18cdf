# SPDX-License-Identifier: Apache-2.0
"""Promise P4: nothing in the verifier has a typed-in tolerance for rounding."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "refmoe"


def test_nothing_is_compared_by_a_tolerance() -> None:
    for folder in ("verifier", "arithmetic/enclosure", "profiles", "steps"):
        for path in (PACKAGE / folder).rglob("*.py"):
            assert not re.search(r"\b(rtol|atol|allclose|isclose|approx)\b", path.read_text()), path


def test_every_budget_of_a_library_function_says_where_it_is_from() -> None:
    """The only tolerances there are."""
    profiles = tomllib.loads((PACKAGE / "profiles" / "profiles.toml").read_text())
    budgets = [value for profile in profiles.values() for value in profile.values() if isinstance(value, dict)]
    budgets = [budget for budget in budgets if "constant" in budget]
    assert len(budgets) >= 3
    assert all(len(budget["source"]) > 20 for budget in budgets)
