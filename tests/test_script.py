"""Run scripts: names, positions and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from refmoe.errors import InputError
from refmoe.script import plan


def test_runs_are_named_and_counted() -> None:
    runs = plan([("prefill", 0, [1, 2]), ("chunk", 0, [3, 4]), ("decode", 0, [5, 6]), ("chunk", 0, [7])], 10, start=100)
    assert [run.run for run in runs] == ["prefill", "chunk1", "decode1", "decode2", "chunk2"]
    assert [run.past for run in runs] == [0, 2, 4, 5, 6]
    assert [run.positions for run in runs] == [(100, 101), (102, 103), (104,), (105,), (106,)]


def test_several_sequences_get_a_suffix() -> None:
    runs = plan([("prefill", 0, [1]), ("prefill", 1, [2, 3]), ("decode", 1, [4]), ("decode", 0, [5])], 10)
    assert [run.run for run in runs] == ["prefill.row0", "prefill.row1", "decode1.row1", "decode1.row0"]
    assert [run.positions for run in runs] == [(0,), (0, 1), (2,), (1,)]


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([("decode", 0, [1])], "begin with one prefill"),
        ([("prefill", 0, [1]), ("prefill", 0, [1])], "out of order"),
        ([("train", 0, [1])], "unknown"),
        ([("prefill", 0, [])], "no tokens"),
        ([("prefill", 0, [10])], "token 10 is outside the vocabulary of 10"),
        ([("prefill", 0, [-1])], "token -1"),
    ],
)
def test_a_bad_script_is_refused(calls: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan(calls, 10)
