# SPDX-License-Identifier: Apache-2.0
"""The verdict on a token, and the prompts that a server is asked about."""

from __future__ import annotations

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.engines.server.interview import GENERATED, Said
from refmoe.engines.server.judging import OPEN, WRONG, Bounds, Place, bounded, calls, judge
from refmoe.engines.server.prompts import LENGTHS, WIDE, Exact, prompts
from refmoe.engines.server.replies import Row
from refmoe.engines.server.served import served_case
from refmoe.profiles.load import policy
from refmoe.verifier.findings import CONTESTABLE, FORCED, TIE
from tests.engines.server.asked import model


def place(logits: list[float], radius: float) -> Place:
    """Logits that err by at most so much."""
    mid = np.array(logits)
    known = np.full((1, len(logits)), radius)
    enclosure = Enclosure(mid[None], known, known**2 / 9, accumulation=policy("float32").accumulation)
    return Place(enclosure, mid - np.log(np.exp(mid).sum()), policy("float32"), 12.0)


@pytest.mark.parametrize(
    ("logits", "radius", "token", "verdict"),
    [
        ([3.0, 1.0, 0.0], 0.1, 0, FORCED),
        ([3.0, 1.0, 0.0], 0.1, 1, WRONG),
        ([3.0, 2.9, 0.0], 0.1, 0, CONTESTABLE),
        ([3.0, 2.9, 0.0], 0.1, 1, CONTESTABLE),
        ([3.0, 2.9, 0.0], 0.1, 2, WRONG),
        ([3.0, 3.0, 0.0], 1e-9, 0, TIE),
        ([3.0, 3.0, 0.0], 1e-9, 1, TIE),
        ([3.0, 1.0, 0.0], np.inf, 2, OPEN),
    ],
)
def test_the_verdict_on_a_token(logits: list[float], radius: float, token: int, verdict: str) -> None:
    assert place(logits, radius).verdict(token) == verdict


def test_a_text_is_cut_where_rows_begin_and_end() -> None:
    row = Row((0,), (-1.0,))
    said = Said(GENERATED, (1, 2, 3, 4, 5, 6), 3, rows={0: row, 2: row, 3: row})
    assert calls(said) == [(0, 1, True), (1, 2, False), (2, 4, True)]


def test_rows_after_an_open_choice_are_left_out_and_not_wrong() -> None:
    rows = {i: Row((0,), (-1.0,)) for i in range(3)}
    found = Said(GENERATED, (5, 6, 7), 3, rows=rows, choices={2: 1})

    class Never(Bounds):
        def at(self, tokens: tuple[int, ...], place_: int) -> Place:
            return place([1.0, 0.0], np.inf if place_ else 0.1)

    (left,) = bounded([found], Never([found], model()))
    assert [*left.rows] == [0]
    assert left.choices == found.choices


def test_the_prompts_are_the_same_each_time_and_clear() -> None:
    case = served_case()
    parameters = case.checkpoint().parameters
    found = prompts(case.config, parameters)
    assert found == prompts(case.config, parameters)
    assert [len(each) for each in found] == [*LENGTHS]
    exact = Exact(case.config, parameters)
    for tokens in found:
        assert case.config.vocab - 1 not in tokens
        caches = None
        for token in tokens:
            _, margin, caches = exact.step(token, caches)
            assert margin >= WIDE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_choice_of_an_expert_is_open_in_the_model_for_servers(dtype: str) -> None:
    """Neither in the prompts nor in what the exact model continues them with."""
    from refmoe.engines.server.measure import said_by
    from refmoe.engines.server.simulated import Simulated

    case = served_case()
    server = Simulated(None, case.config, case.checkpoint().parameters, policy(dtype))
    found = judge(said_by(server), model(dtype))
    assert found.open_rows == 0
    assert found.counted()[OPEN] == 0
    assert not found.wrong
