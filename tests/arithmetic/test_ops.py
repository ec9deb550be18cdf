# SPDX-License-Identifier: Apache-2.0
"""The common behaviour of all kinds of ops, and the special behaviour of some."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.ball import BallOps, chooses, midpoints
from refmoe.arithmetic.exact import dot
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.formats import upcast
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.arithmetic.weight_cache import WeightCache
from refmoe.checkpoints.weight import Weight

KINDS = {"float32": lambda: NativeOps(np.float32), "float64": NativeOps, "exact": ExactOps, "ball": BallOps}
ROUNDING = {"float32": 2.0**-24, "float64": 2.0**-53, "exact": 2.0**-53, "ball": 2.0**-53}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def numbers(x: Any) -> Any:
    return midpoints(x) if x.dtype == object else np.asarray(x, np.float64)


def weight(values: Any) -> Weight:
    return Weight(name="w", shape=values.shape, dtype=values.dtype, source=lambda: values, origin="w")


def test_equal_logits_go_to_the_lower_expert(kind: str) -> None:
    """ROUTE-3, with ties at every rank and signed zeros."""
    ops = KINDS[kind]()
    logits = ops.array([[1.0, 3.0, 3.0, 2.0], [0.0, -0.0, 0.0, -1.0], [5.0, 5.0, 5.0, 5.0], [-2.0, -1.0, -2.0, -1.0]])
    assert ops.top_k(logits, 3).tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 2], [1, 3, 0]]


@given(st.lists(st.integers(0, 4), max_size=40))
def test_grouping_is_stable_and_can_be_undone(ids: list[int]) -> None:
    ops = NativeOps()
    order, counts = ops.group(ops.integers(ids), 5)
    assert counts == [ids.count(e) for e in range(5)]
    assert [(ids[i], i) for i in order.tolist()] == sorted((e, i) for i, e in enumerate(ids))
    assert order[ops.inverse(order)].tolist() == list(range(len(ids)))


def test_products_and_sums_agree_with_integers(kind: str) -> None:
    """Small integers are exact in every arithmetic."""
    rng = np.random.default_rng(1)
    ops = KINDS[kind]()
    x, w = rng.integers(-9, 9, (3, 5, 7)).astype(np.float64), rng.integers(-9, 9, (4, 7)).astype(np.float32)
    a, b = rng.integers(-9, 9, (2, 3, 5)).astype(np.float64), rng.integers(-9, 9, (2, 5, 6)).astype(np.float64)
    assert np.array_equal(numbers(ops.linear(ops.array(x), weight(w))), x @ w.T)
    assert np.array_equal(numbers(ops.matmul(ops.array(a), ops.array(b))), a @ b)
    assert np.array_equal(numbers(ops.sum(ops.array(x), axis=1)), x.sum(1))
    assert np.array_equal(numbers(ops.max(ops.array(x), axis=-1)), x.max(-1))


def test_functions_agree_with_mathematics(kind: str) -> None:
    ops = KINDS[kind]()
    x = ops.array([-700.0, -30.0, -1.0, 0.0, 1.0, 30.0]) if kind != "float32" else ops.array([-80.0, -1.0, 0.0, 1.0])
    values, bound = numbers(x), 4 * ROUNDING[kind]
    assert np.allclose(numbers(ops.exp(x)), np.exp(values), rtol=bound, atol=0)
    assert np.allclose(numbers(ops.sigmoid(x)), np.exp(values) / (1 + np.exp(values)), rtol=2 * bound, atol=0)
    assert np.allclose(numbers(ops.sqrt(x * x)), np.abs(values), rtol=bound, atol=0)
    cos, sin = ops.unit_circle(ops.integers([0, 1, 100]), 100.0, [0, 1], 2)
    angles = np.array([[0, 0], [1, 0.1], [100, 10]])
    assert np.allclose(numbers(cos), np.cos(angles), rtol=0, atol=bound)
    assert np.allclose(numbers(sin), np.sin(angles), rtol=0, atol=bound)


def test_angles_follow_positions_that_change_in_place(kind: str) -> None:
    ops = KINDS[kind]()
    positions = ops.integers([3, 7])
    ops.unit_circle(positions, 100.0, [0, 1], 2)
    positions += 1
    found = ops.unit_circle(positions, 100.0, [0, 1], 2)
    anew = KINDS[kind]().unit_circle(positions, 100.0, [0, 1], 2)
    assert all(np.array_equal(numbers(a), numbers(b)) for a, b in zip(found, anew, strict=True))


def test_selection_moves_numbers_unchanged(kind: str) -> None:
    ops = KINDS[kind]()
    x = ops.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert numbers(ops.gather(x, np.array([[2, 0], [1, 1]]))).tolist() == [[3, 1], [5, 5]]
    assert numbers(ops.concatenate([x, x[:1]])).tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3]]
    assert numbers(ops.where(np.array([True, False, True]), x, 0.0)).tolist() == [[1, 0, 3], [4, 0, 6]]
    assert numbers(ops.embed(weight(np.eye(3)), ops.integers([2, 0]))).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert numbers(ops.vector(weight(np.array([1, 2], np.float16)))).tolist() == [1, 2]


def test_taps_are_named_from_the_outside_in(kind: str) -> None:
    seen = []
    ops = KINDS[kind]()
    ops._tap = lambda name, x: seen.append(name)
    inner = ops.within("layers.3.").within("router.")
    assert inner.tap("logits", 1) == 1
    assert seen == ["layers.3.router.logits"]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_every_stored_value_is_converted_exactly(dtype: Any) -> None:
    """All 65536 bfloat16 and float16 values, by their definition."""
    if np.dtype(dtype).itemsize == 2:
        stored = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        stored = np.random.default_rng(1).standard_normal(100).astype(dtype)
    for wide in (np.float32, np.float64):
        if np.dtype(wide).itemsize >= np.dtype(dtype).itemsize:
            with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
                found = upcast(stored, np.dtype(wide))
            assert found.dtype == wide
            assert np.array_equal(found, [float(value) for value in stored.tolist()], equal_nan=True)


def test_a_prepared_weight_is_prepared_once_while_it_fits() -> None:
    cache, prepared = WeightCache(limit=10), []

    def get(key: object, size: int) -> None:
        cache.get(key, lambda: prepared.append(key), lambda _: size)

    a, b, c = object(), object(), object()
    for key in (a, b, a, a):
        get(key, 5)
    assert prepared == [a, b]
    get(c, 5)  # pushes out b, which was used longest ago
    get(a, 5)
    assert prepared == [a, b, c]
    get(b, 5)
    assert prepared == [a, b, c, b]
    huge = object()
    get(huge, 11)
    get(huge, 11)
    assert prepared[-2:] == [huge, huge]
    assert cache.held <= cache.limit


def test_balls_prove_only_the_decisions_that_they_separate() -> None:
    """Disjoint balls prove a decision and overlapping balls do not. Equal exact balls follow the tie rule."""
    ops = BallOps()
    arb = ops.flint.arb
    clear, near = [arb(3), arb(1), arb(2)], [arb(2, 1e-3), arb(1), arb(2)]
    tie = [arb(2), arb(2), arb(1)]
    rows = np.empty((6, 3), object)
    rows[:] = [clear, clear, near, near, tie, tie]
    ids = np.array([[0, 2], [2, 0], [0, 2], [2, 0], [0, 1], [1, 0]])
    assert chooses(rows, ids).tolist() == [True, False, False, False, True, False]
    last = np.empty((1, 3), object)
    last[:] = [[arb(3), arb(2), arb(2, 1e-9)]]
    assert chooses(last, np.array([[0, 1]])).tolist() == [False]


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_balls_contain_what_exact_ops_compute_to_an_ulp(values: list[float]) -> None:
    """A ball encloses the real number, and the exact result lies within one rounding of that number."""
    ball, exact = BallOps(), ExactOps()
    x, y = ball.array(values), exact.array(values)
    for found, wanted in ((ball.exp(x), exact.exp(y)), (ball.sigmoid(x), exact.sigmoid(y))):
        for enclosure, value in zip(found, wanted.tolist(), strict=True):
            assert abs(enclosure - value) <= abs(enclosure) * 2.0**-52


def test_exact_ops_split_a_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is split once for all calls and prefixes, until the cache drops it."""
    prepared = []
    prepare = dot.prepare
    monkeypatch.setattr(dot, "prepare", lambda *arguments: prepared.append(1) or prepare(*arguments))
    ops, w = ExactOps(), weight(np.eye(3))
    for inner in (ops, ops.within("layers.0."), ops.within("layers.1.")):
        inner.linear(ops.array(np.ones((2, 3))), w)
    assert len(prepared) == 1
    small = ExactOps(prepared_bytes=0)
    for _ in range(2):
        small.linear(ops.array(np.ones((2, 3))), w)
    assert len(prepared) == 3
