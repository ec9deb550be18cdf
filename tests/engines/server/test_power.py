# SPDX-License-Identifier: Apache-2.0
"""The table of the bugs that a server's evidence shows: it is whole, and it is that of the measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refmoe.engines.server.interview import GENERATED, PROMPT, Answers, Said
from refmoe.engines.server.measure import SPECIFICATION, Work, as_table, seen_at
from refmoe.engines.server.power import CONTAINED, LARGEST, LEVELS, PROMPTS, TOKENS, WHOLE, level_of, power_of, table
from refmoe.engines.server.replies import Row
from refmoe.profiles.load import policy
from refmoe.suite.matrix.outcomes import POLICIES, runnable

RESULTS = Path(__file__).parents[3] / "bench" / "results" / "server_power.json"


def test_the_packed_table_is_that_of_the_measurement() -> None:
    assert as_table(json.loads(RESULTS.read_text(encoding="utf-8"))) == table()


def test_the_table_has_every_bug_at_every_dtype_and_no_false_alarm() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [*found] == [SPECIFICATION, *runnable()]
    assert all({*measured} == {*POLICIES} for measured in found.values())
    assert not any(found[SPECIFICATION].values())


def test_more_evidence_shows_no_less() -> None:
    seen = table()["seen"]
    for level, contained in CONTAINED.items():
        for less in contained:
            for dtype in POLICIES:
                assert {*seen[less][dtype]} <= {*seen[level][dtype]}


@pytest.mark.parametrize("dtype", POLICIES)
def test_the_power_counts_each_bug_once(dtype: str) -> None:
    for level in LEVELS:
        found = power_of(level, policy(dtype))
        assert found.seen + len(found.unseen) == found.known == len(table()["known"][dtype]) == len(runnable())


@pytest.mark.parametrize("name", [SPECIFICATION, "norm-eps-1e-6", "rope-theta-default"])
def test_a_row_of_the_table_is_measured_again(name: str) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert seen_at(Work(name, "float32")) == found[name]["float32"]


def said(way: str, entries: int) -> Said:
    return Said(way, (1, 2), 2, rows={1: Row(tuple(range(entries)), tuple(-1.0 - i for i in range(entries)))})


@pytest.mark.parametrize(
    ("answers", "level"),
    [
        ([], TOKENS),
        ([said(PROMPT, 9)], TOKENS),
        ([said(PROMPT, 10)], PROMPTS),
        ([said(GENERATED, 4)], TOKENS),
        ([said(GENERATED, 5)], LARGEST),
        ([said(GENERATED, 10)], WHOLE),
        ([said(PROMPT, 10), said(GENERATED, 5)], LARGEST),
    ],
)
def test_the_level_of_answers(answers: list[Said], level: str) -> None:
    assert level_of(Answers(said=answers), 10) == level
