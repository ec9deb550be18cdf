# SPDX-License-Identifier: Apache-2.0
"""Comparing traces: distances by hand, and slots lined up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.errors import InputError
from refmoe.traces.script import plan
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.distances import compare_traces, measure

RUNS = plan([("prefill", 0, [1, 2])], 10)


def compare(tmp_path: Path, found: dict[str, Any], expected: dict[str, Any], runs: Any = RUNS) -> Any:
    for name, arrays, listed in (("found", found, runs), ("expected", expected, RUNS)):
        write_trace(
            tmp_path / name, Header(listed), {f"prefill/{tap}": np.asarray(value) for tap, value in arrays.items()}
        )
    return compare_traces(read_trace(tmp_path / "found"), read_trace(tmp_path / "expected"))


def test_a_distance_by_hand() -> None:
    distance = measure("prefill", "logits", np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([[3.0, 4.5], [0.0, 1.25]]))
    assert distance.relative_rms == np.sqrt(0.3125) / np.sqrt(9 + 20.25 + 1.5625)
    assert (distance.worst, distance.where, distance.found, distance.expected) == (0.5, (0, 1), 4.0, 4.5)


def test_what_is_not_a_number_is_never_close() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        distance = measure("prefill", "logits", np.array([1.0, bad]), np.array([1.0, 2.0]))
        assert not distance.relative_rms < 1e300
        assert distance.where == (1,)
    same = measure("prefill", "scores", np.array([np.inf, 1.0]), np.array([np.inf, 1.0]))
    assert same.worst == 0


def test_slots_follow_each_trace_s_own_order_of_experts(tmp_path: Path) -> None:
    """An equal choice in another order is no difference. A token that went elsewhere is listed, not measured."""
    ids, weights = np.array([[3, 1], [0, 2]]), np.array([[0.75, 0.25], [0.5, 0.5]])
    outputs = np.arange(8.0).reshape(2, 2, 2)
    expected = {
        "layers.0.router.experts": ids, "layers.0.router.weights": weights, "layers.0.expert.output": outputs,
    }  # fmt: skip
    swapped = {name: array[:, ::-1] for name, array in expected.items()}
    result = compare(tmp_path, swapped, expected)
    assert not result.routing
    assert result.decisions == 2
    assert all(distance.worst == 0 for distance in result.distances)
    elsewhere = {name: array.copy() for name, array in expected.items()}
    elsewhere["layers.0.router.experts"][1, 0] = 4
    elsewhere["layers.0.expert.output"][1] = 99
    result = compare(tmp_path, elsewhere, expected)
    assert [(r.token, r.found, r.expected) for r in result.routing] == [(1, (4, 2), (0, 2))]
    assert all(distance.worst == 0 for distance in result.distances)


def test_the_worst_element_keeps_its_token_when_others_are_left_out(tmp_path: Path) -> None:
    expected = {
        "layers.0.router.experts": np.array([[0, 1], [0, 1]]), "layers.0.expert.output": np.ones((2, 2, 2)),
    }  # fmt: skip
    found = {name: array.copy() for name, array in expected.items()}
    found["layers.0.router.experts"][0] = (2, 3)
    found["layers.0.expert.output"][1, 1, 0] = 5
    (distance,) = compare(tmp_path, found, expected).distances
    assert distance.where == (1, 1, 0)


def test_missing_and_unknown_taps_are_named(tmp_path: Path) -> None:
    result = compare(tmp_path, {"logits": [1.0], "mystery": [1.0]}, {"logits": [1.0], "embedding": [1.0]})
    assert result.missing == ("prefill/embedding",)
    assert result.unknown == ("prefill/mystery",)


def test_traces_that_cannot_be_compared(tmp_path: Path) -> None:
    other_tokens = plan([("prefill", 0, [1, 3])], 10)
    other_run = plan([("prefill", 0, [1]), ("decode", 0, [2])], 10)
    with pytest.raises(InputError, match="tokens"):
        compare(tmp_path, {"logits": [1.0]}, {"logits": [1.0]}, other_tokens)
    with pytest.raises(InputError, match=r"tokens|decode1"):
        compare(tmp_path, {"logits": [1.0]}, {"logits": [1.0]}, other_run)
    with pytest.raises(InputError, match="shape"):
        compare(tmp_path, {"logits": [1.0]}, {"logits": [1.0, 2.0]})
    with pytest.raises(InputError, match="shares no tap"):
        compare(tmp_path, {"logits": [1.0]}, {"embedding": [1.0]})
