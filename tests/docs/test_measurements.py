# SPDX-License-Identifier: Apache-2.0
"""docs/measurements.md and the measured blocks of README.md are those that the files of results give."""

from __future__ import annotations

import pytest

from bench import measurements


def test_the_page_is_current() -> None:
    assert measurements.PAGE.read_text(encoding="utf-8") == measurements.page(), "run python -m bench.measurements"


def test_the_blocks_of_the_readme_are_current() -> None:
    text = measurements.README.read_text(encoding="utf-8")
    assert {name for _, name, _ in measurements.BLOCK.findall(text)} == {*measurements.BLOCKS}
    assert measurements.readme(text) == text, "run python -m bench.measurements"


@pytest.mark.parametrize(("value", "shown"), [(0, "0%"), (1, "100%"), (0.996, "99.6%"), (0.5, "50%"), (0.004, "0.4%")])
def test_a_share_that_is_not_all_is_not_shown_as_all(value: float, shown: str) -> None:
    assert measurements._share(value) == shown


def test_the_promises_of_full_size_are_kept() -> None:
    """The memory that was stated before a run is enough for it, and it is below the goal."""
    found = measurements.results("full_size")
    for tokens in (8, 256):
        for run in found[f"two_layers_{tokens}_tokens"]:
            assert run["peak_gib"] <= run["stated_gib"] <= run["goal_gib"]
    assert found["whole"]["ok"]


def test_every_engine_was_run_on_every_case() -> None:
    cases = len(measurements.find_cases(measurements.GOLDEN))
    files = sorted((measurements.RESULTS / "conform").glob("*.json"))
    assert len(files) >= 5
    for file in files:
        outcomes = measurements.read_results(file).outcomes
        dtypes = [each.dtype for each in outcomes]
        assert {dtypes.count(dtype) for dtype in dtypes} == {cases}
