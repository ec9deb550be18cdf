# SPDX-License-Identifier: Apache-2.0
"""Scripts: names of runs, positions, cuts of caches, and refused scripts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.native.ops import NativeOps
from refmoe.errors import InputError
from refmoe.traces.script import Call, Packed, execute, plan
from refmoe.traces.trace import Recorder, Run
from tests.models import random_model


def executed(runs: tuple[Run, ...]) -> dict[str, Any]:
    recorder = Recorder()
    execute(NativeOps(np.float64, recorder), random_model(), runs, recorder)
    return recorder.arrays


def test_runs_are_named_and_counted() -> None:
    runs = plan([("prefill", 0, [1, 2]), ("chunk", 0, [3, 4]), ("decode", 0, [5, 6]), ("chunk", 0, [7])], 10, start=100)
    assert [run.run for run in runs] == ["prefill", "chunk1", "decode1", "decode2", "chunk2"]
    assert [run.past for run in runs] == [0, 2, 4, 5, 6]
    assert [run.positions for run in runs] == [(100, 101), (102, 103), (104,), (105,), (106,)]


def test_several_sequences_get_a_suffix() -> None:
    """Each counts its positions from 0, its cached tokens included (ROPE-2)."""
    runs = plan([("prefill", 0, [1]), ("prefill", 1, [2, 3]), ("decode", 1, [4]), ("decode", 0, [5])], 10)
    assert [run.run for run in runs] == ["prefill.row0", "prefill.row1", "decode1.row1", "decode1.row0"]
    assert [run.positions for run in runs] == [(0,), (0, 1), (2,), (1,)]


def test_a_request_that_keeps_a_prefix_goes_on_after_it() -> None:
    """A cut belongs to the first run of a decode; the later runs feed their tokens one by one."""
    runs = plan([("prefill", 0, [1, 2, 3]), ("decode", 0, [4]), Call("decode", 0, [5, 6], keep=2)], 10, start=7)
    assert [run.run for run in runs] == ["prefill", "decode1", "decode2", "decode3"]
    assert [run.past for run in runs] == [0, 3, 2, 3]
    assert [run.positions for run in runs[2:]] == [(9,), (10,)]


def test_a_cut_cache_is_that_of_the_prefix_alone() -> None:
    """Bit for bit: no token of the first request behind the prefix is left in the cache."""
    shared = executed(plan([("prefill", 0, [1, 2, 3, 4, 5]), Call("chunk", 0, [6, 7], keep=3)], 37))
    alone = executed(plan([("prefill", 0, [1, 2, 3]), ("chunk", 0, [6, 7])], 37))
    chunk = [key for key in alone if key.startswith("chunk1/")]
    assert len(chunk) == len(alone) // 2
    assert all(np.array_equal(shared[key], alone[key]) for key in chunk)
    uncut = executed(plan([("prefill", 0, [1, 2, 3, 4, 5]), ("chunk", 0, [6, 7])], 37))
    assert not np.array_equal(uncut["chunk1/logits"], alone["chunk1/logits"])


def test_segments_of_a_packed_call_are_sequences_of_their_own() -> None:
    calls = [("prefill", 3, [9]), Packed([[1, 2, 3], [4, 5]]), ("decode", 3, [8])]
    runs = plan(calls, 37, start=2)
    assert [run.run for run in runs] == ["prefill", "packed.seg0", "packed.seg1", "decode1"]
    assert [run.op for run in runs] == ["prefill", "prefill", "prefill", "decode"]
    assert [run.sequence for run in runs] == [3, 4, 5, 3]
    assert [run.positions for run in runs[1:3]] == [(2, 3, 4), (2, 3)]
    assert [run.past for run in runs] == [0, 0, 0, 1]
    found, alone = executed(runs), executed(plan([("prefill", 0, [4, 5])], 37, start=2))
    assert np.array_equal(found["packed.seg1/logits"], alone["prefill/logits"])


def test_a_run_that_continues_more_than_was_seen_is_refused() -> None:
    runs = plan([("prefill", 0, [1, 2]), ("decode", 0, [3])], 37)
    with pytest.raises(InputError, match=r"run 'decode1': past is 3, but sequence 0 has seen 2"):
        executed((runs[0], replace(runs[1], past=3)))


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([], "no call"),
        ([("decode", 0, [1])], "begin with one prefill"),
        ([("prefill", 0, [1]), ("prefill", 0, [1])], "out of order"),
        ([("train", 0, [1])], "unknown"),
        ([("prefill", 0, [])], "no tokens"),
        ([("prefill", 0, [10])], "token 10 is outside the vocabulary of 10"),
        ([("prefill", 0, [-1])], "token -1"),
        ([("prefill", 0, [1]), Call("chunk", 0, [1], keep=2)], "keeps 2 tokens, but from 1 to the 1"),
        ([("prefill", 0, [1]), Call("chunk", 0, [1], keep=0)], "keeps 0 tokens"),
        ([Call("prefill", 0, [1], keep=1)], "keeps 1 tokens"),
        ([Packed([])], "packed has no segments"),
        ([Packed([[1], []])], "segment 1 of packed has no tokens"),
        ([Packed([[10]])], "token 10 is outside"),
        ([Packed([[1]]), Packed([[1]])], "two packed calls"),
    ],
)
def test_a_bad_script_is_refused(calls: Any, words: str) -> None:
    """INPUT-1: tokens outside the vocabulary, and other faults of a script."""
    with pytest.raises(InputError, match=words):
        plan(calls, 10)
