# SPDX-License-Identifier: Apache-2.0
"""The sizes are those that the measurements give, and the measurements are those of today."""

from __future__ import annotations

import json

import pytest

from bench.pack import QUANTISED, TABLE, Work, measure, read_results, sizes
from refmoe.bugs.catalogue import MUTANTS
from refmoe.suite.matrix.outcomes import SPECIFICATION, runnable
from refmoe.suite.pack.legal import DTYPES, MOST_VALUES
from refmoe.suite.pack.sizes import FULL, MOST_BYTES, STANDARD, table
from tests.pack.packs import GOLDEN

STRICTER = {name for name, each in MUTANTS.items() if each.judged_by}
"""Bugs that break a rule of some engines' policies, which any engine in a dtype need not keep."""


def test_the_table_is_what_the_measurements_give() -> None:
    recorded, found = json.loads(TABLE.read_text()), sizes()
    for document in (recorded, found):
        for each in document["sizes"].values():
            each.pop("bytes")  # another test builds the packs
    assert recorded == found


def test_no_case_accuses_the_specification() -> None:
    for name, case in read_results()["cases"].items():
        for dtype, shown in case["shown"].items():
            assert SPECIFICATION not in shown, (name, dtype)


def test_standard_sees_nearly_all_bugs_in_float32() -> None:
    """All but two of those that can show in values of float32, on a case's own weights."""
    unseen = {*table()[STANDARD].unseen["float32"]} - QUANTISED - STRICTER
    assert len(unseen) <= 2
    assert table()[STANDARD].bytes < MOST_BYTES[STANDARD]


def test_the_significance_counts_more_values_than_any_pack_has() -> None:
    assert max(table()[FULL].values[dtype] for dtype in DTYPES) < MOST_VALUES


@pytest.mark.parametrize("dtype", DTYPES)
def test_measurements_are_current(dtype: str) -> None:
    """Some bugs of each kind, planted again into one case."""
    case = "window-decode"
    wanted = {*runnable()[:: len(runnable()) // 9]}
    found = measure(Work(GOLDEN / case, (dtype,), {dtype: frozenset({*runnable()} - wanted)}))
    recorded = read_results()["cases"][case]
    assert found["bytes"] == recorded["bytes"]
    assert found["steps"] == recorded["steps"]
    assert found["judged"] == recorded["judged"]
    again = found["shown"][dtype]
    assert again == {name: steps for name, steps in recorded["shown"][dtype].items() if name in wanted}
    assert len(again) >= 4
