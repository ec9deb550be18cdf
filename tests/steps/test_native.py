# SPDX-License-Identifier: Apache-2.0
"""The steps that save arrays: the spec's values where nobody watches, the spec's own bits where somebody does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.native.lanes import Lanes
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.spec import experts as spec_experts
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Steps, forward
from refmoe.steps.native import BLOCK, NATIVE_STEPS, swiglu


@st.composite
def configs(draw: st.DrawFn) -> Config:
    kv_heads, share, experts = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return Config(
        dim=draw(st.integers(3, 20)), layers=2, heads=kv_heads * share, kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)), hidden_dim=draw(st.integers(1, 30)), vocab=11, experts=experts,
        experts_per_token=draw(st.integers(1, experts)), window=draw(st.sampled_from([None, 1, 3])),
    )  # fmt: skip


def run(config: Config, steps: Steps, ops: NativeOps, calls: tuple[int, ...]) -> Array:
    """Logits [T, V] of tokens in calls of so many."""
    model, caches, past, found = Model(config, synthetic_checkpoint(config, 3).parameters, steps), None, 0, []
    for count in calls:
        positions = np.arange(past, past + count)
        logits, caches = forward(ops, model, positions % config.vocab, positions, caches)
        found.append(logits)
        past += count
    return np.concatenate(found)


@given(configs(), st.sampled_from([(1,), (7,), (4, 3), (5, 1, 1), (150,), (40, 1, 1, 1, 70)]))
def test_unwatched_steps_compute_the_spec(config: Config, calls: tuple[int, ...]) -> None:
    expected = run(config, Steps(), NativeOps(np.float64), calls)
    np.testing.assert_allclose(run(config, NATIVE_STEPS, NativeOps(np.float64), calls), expected, rtol=0, atol=1e-12)


@given(configs())
def test_watched_steps_are_those_of_the_spec(config: Config) -> None:
    spec: dict[str, Array] = {}
    ours: dict[str, Array] = {}
    run(config, Steps(), NativeOps(np.float64, lambda name, x: spec.update({name: x.copy()})), (5,))
    run(config, NATIVE_STEPS, NativeOps(np.float64, lambda name, x: ours.update({name: x.copy()})), (5,))
    assert [*ours] == [*spec]
    assert all(np.array_equal(ours[name], spec[name]) for name in spec)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lowest", [-5.0, -87.0, -95.0, -700.0, -745.0])
def test_a_gate_far_below_zero_keeps_its_digits(dtype: Any, lowest: float) -> None:
    """exp(-gate) overflows there; the result may not become 0 before it is too small to be a normal number."""
    gate = np.linspace(lowest, 5, BLOCK + 7, dtype=dtype).reshape(-1, 1)
    up = np.full_like(gate, 2)
    with np.errstate(over="raise", invalid="raise"):
        found = swiglu(NativeOps(dtype), gate, up)
    wide = gate.astype(np.longdouble)
    exact = 2 * wide * (np.exp(np.minimum(wide, 0)) / (1 + np.exp(-np.abs(wide))))
    normal = np.abs(exact) >= 1000 * np.finfo(dtype).tiny
    relative = np.abs(found - exact)[normal] / np.abs(exact)[normal]
    assert relative.max() < 8 * np.finfo(dtype).eps


def test_a_cache_can_be_continued_twice() -> None:
    """CACHE-1: what one continuation appends is not in the other, nor in what both began with."""
    ops, rng = NativeOps(np.float64), np.random.default_rng(1)

    def tokens(past: int, count: int) -> tuple[Array, Array, Array]:
        return rng.standard_normal((count, 2, 3)), rng.standard_normal((count, 2, 3)), np.arange(past, past + count)

    def extended(steps: Steps, pieces: list[tuple[Array, Array, Array]]) -> list[Any]:
        caches: list[Any] = [None]
        for piece in pieces:
            caches.append(steps.extend_cache(ops, caches[-1], *piece))
        return caches[1:]

    trunk, one, other = [tokens(0, 3), tokens(3, 1)], [tokens(4, 1), tokens(5, 9)], [tokens(4, 2)]
    ours = extended(NATIVE_STEPS, trunk)
    branches = []
    for branch in (one, other):
        cache = ours[-1]
        for piece in branch:
            cache = NATIVE_STEPS.extend_cache(ops, cache, *piece)
        branches.append(cache)
    for found, pieces in zip((*ours, *branches), (trunk[:1], trunk, trunk + one, trunk + other), strict=True):
        right = extended(Steps(), pieces)[-1]
        for name in ("k", "v", "positions"):
            np.testing.assert_array_equal(getattr(found, name), getattr(right, name))


def test_a_token_is_appended_without_copying_those_before() -> None:
    ops, piece = NativeOps(np.float64), (np.ones((1, 2, 3)), np.ones((1, 2, 3)), np.array([7]))
    cache = NATIVE_STEPS.extend_cache(ops, NATIVE_STEPS.extend_cache(ops, None, *piece), *piece)
    assert np.shares_memory(NATIVE_STEPS.extend_cache(ops, cache, *piece).k, cache.k)


def test_experts_nobody_chose_are_not_run() -> None:
    class Refused:
        w1 = w2 = w3 = None
        widths = 3, 3, 3, 4

    config = Config(
        dim=4, layers=1, heads=1, kv_heads=1, head_dim=2, hidden_dim=3, vocab=5, experts=3, experts_per_token=1
    )
    expert = synthetic_checkpoint(config, 1).parameters.layers[0].experts[0]
    x, chosen = np.ones((2, 4)), np.array([[1], [1]])
    experts: Any = (Refused(), expert, Refused())
    found = NATIVE_STEPS.run_experts(NativeOps(np.float64), experts, x, chosen)
    expected = spec_experts.run_experts(NativeOps(np.float64), experts, x, chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_what_heads_in_lanes_return_is_added_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever lane ends first: the same bits. (With two there is but one order; here are three.)"""
    lanes = Lanes()
    lanes.count = 3
    monkeypatch.setattr("refmoe.steps.native_attention.lanes", lambda: lanes)
    config = Config(
        dim=48, layers=1, heads=6, kv_heads=3, head_dim=8, hidden_dim=16, vocab=11, experts=2, experts_per_token=1
    )
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        monkeypatch.setattr(lanes, "run", lambda pieces, order=order: [pieces[i]() for i in order])
        found.append(run(config, NATIVE_STEPS, NativeOps(np.float32), (64,)))
    assert all(np.array_equal(one, found[0]) for one in found)
    np.testing.assert_allclose(found[0], run(config, Steps(), NativeOps(np.float64), (64,)), rtol=0, atol=1e-3)
