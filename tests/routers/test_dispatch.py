# SPDX-License-Identifier: Apache-2.0
"""The laws of dispatch and combine, of capacity, and of the load statistics."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.ball import BallOps
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.weight import Weight
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.deepseek_v3 import deepseek_v3
from refmoe.routers.literature.dispatch import buffers, combine, dense_mixture, dispatch, make_plan, mixture
from refmoe.routers.literature.expert_choice import expert_choice
from refmoe.routers.literature.gshard import gshard
from refmoe.routers.literature.mixtral import mixtral
from refmoe.routers.literature.record import Routing
from refmoe.routers.literature.st_moe import st_moe
from refmoe.routers.literature.statistics import load_statistics
from refmoe.routers.literature.switch import switch
from refmoe.spec.experts import Expert, run_expert, run_experts
from refmoe.spec.experts import combine as spec_combine

OPS: Any = ExactOps()
BALLS = BallOps()


@st.composite
def routings(draw: st.DrawFn, full: bool = False) -> Routing:
    """Any routing: any ids, refused or not, any capacity. full: no slot refused or dropped"""
    experts = draw(st.integers(1, 5))
    k = draw(st.integers(1, experts))
    tokens = draw(st.integers(0 if not full else 1, 12))
    ids = [draw(st.permutations(range(experts)))[:k] for _ in range(tokens)]
    shape = (tokens, k)
    weights = [[draw(st.integers(1, 16)) / 16 for _ in range(k)] for _ in range(tokens)]
    asked = [[full or draw(st.booleans()) for _ in range(k)] for _ in range(tokens)]
    capacity = None if full else draw(st.none() | st.integers(1, 6))
    return admit(
        OPS, np.array(ids, np.int64).reshape(shape), np.array(weights, float).reshape(shape), experts, capacity,
        np.array(asked, bool).reshape(shape), False if full else draw(st.booleans()),
    )  # fmt: skip


def random_rows(tokens: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((tokens, 3))


def identity(rows: Any) -> Any:
    return rows


def random_experts(count: int) -> list[Any]:
    """Gated networks of the spec, 3 to 4 to 3."""

    def weight(name: str, shape: tuple[int, int], seed: int) -> Weight:
        return Weight(
            name=name,
            shape=shape,
            dtype=np.float64,
            source=lambda: np.random.default_rng(seed).standard_normal(shape),
            origin=name,
        )

    made = [
        Expert(weight("w1", (4, 3), 3 * e), weight("w2", (3, 4), 3 * e + 1), weight("w3", (4, 3), 3 * e + 2))
        for e in range(count)
    ]
    return [lambda rows, expert=expert: run_expert(OPS, expert, rows)[3] for expert in made]


@given(routings())
def test_capacity_is_never_exceeded_and_the_dropped_are_the_last(routing: Routing) -> None:
    """CAP-2, CAP-3, LOAD-1: for each expert, kept slots come before dropped ones in priority order."""
    tokens, k = routing.ids.shape
    for e in range(routing.experts):
        line = [(t, j) for j in range(k) for t in range(tokens) if routing.ids[t, j] == e and routing.asked[t, j]]
        kept = [bool(routing.kept[slot]) for slot in line]
        assert kept == sorted(kept, reverse=True)
        assert routing.capacity is None or sum(kept) <= routing.capacity
        places = [int(routing.positions[slot]) for slot in line]
        assert places == sorted(set(places))
        if routing.capacity is None:
            assert all(kept)


@given(routings())
def test_a_plan_is_a_permutation_and_stable(routing: Routing) -> None:
    """DISPATCH-1: every slot once, every kept slot has a row, rows by expert and place."""
    plan = make_plan(OPS, routing)
    tokens, k = routing.ids.shape
    n = sum(plan.counts)
    assert sorted(plan.order.tolist()) == list(range(tokens * k))
    kept = routing.kept.reshape(-1)
    assert kept[plan.order[:n]].all()
    assert not kept[plan.order[n:]].any()
    assert [int(plan.rows[s]) for s in plan.order[:n]] == list(range(n))
    assert (plan.rows[~kept] == n).all()
    keys = [(routing.ids.flat[s], routing.positions.flat[s]) for s in plan.order[:n].tolist()]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)
    assert plan.counts == tuple(np.bincount(routing.ids[routing.kept], minlength=routing.experts).tolist())


@given(routings())
def test_dispatch_moves_rows_and_changes_none(routing: Routing) -> None:
    """DISPATCH-2, by a loop over the slots; DISPATCH-3: the padded buffers hold the same rows at their places."""
    x = random_rows(len(routing.ids))
    batches = dispatch(OPS, make_plan(OPS, routing), x)
    for e, rows in enumerate(batches):
        wanted = sorted(
            (routing.positions[t, j], t) for t, j in zip(*np.nonzero(routing.kept & (routing.ids == e)), strict=True)
        )
        assert rows.tolist() == [x[t].tolist() for _, t in wanted]
    padded = buffers(OPS, routing, batches)
    size = padded.shape[1]
    assert size == (max(map(len, batches)) if routing.capacity is None else routing.capacity)
    for e, rows in enumerate(batches):
        assert (padded[e, : len(rows)] == rows).all()
        assert (padded[e, len(rows) :] == 0).all()


@given(routings(full=True))
def test_identity_experts_are_the_identity_where_nothing_is_dropped(routing: Routing) -> None:
    """DISPATCH-4, with weights that sum to 1 in the real numbers: the balls of the output enclose the input."""
    logits = BALLS.array(np.random.default_rng(1).standard_normal((len(routing.ids), routing.experts)))
    real = mixtral(BALLS, logits, routing.ids.shape[1])
    x = random_rows(len(routing.ids))
    out = mixture(BALLS, real, [identity] * routing.experts, BALLS.array(x))
    assert all(ball.contains(BALLS.flint.arb(v)) for ball, v in zip(out.ravel(), x.ravel().tolist(), strict=True))
    assert all(float(ball.rad()) < 1e-30 for ball in out.ravel())


@given(routings())
def test_identity_experts_scale_by_the_weight_that_is_kept(routing: Routing) -> None:
    """DISPATCH-4, CAP-4: sixteenths and small integers do not round, so the equation holds bit for bit."""
    x = np.arange(2.0 * len(routing.ids)).reshape(-1, 2)
    out = mixture(OPS, routing, [identity] * routing.experts, x)
    assert (out == x * (routing.weights * routing.kept).sum(axis=1)[:, None]).all()
    assert (out[~routing.kept.any(axis=1)] == 0).all()


@given(routings())
def test_what_is_not_kept_has_no_weight_whatever_the_record_says(routing: Routing) -> None:
    """DISPATCH-4, DISPATCH-5: a record with weights that are not cleared gives the layer of the cleared record."""
    careless = replace(routing, weights=np.where(routing.kept, routing.weights, 7.0))
    x = random_rows(len(routing.ids))
    experts = [identity] * routing.experts
    expected = mixture(OPS, routing, experts, x)
    assert (mixture(OPS, careless, experts, x) == expected).all()
    assert (dense_mixture(OPS, careless, experts, x) == expected).all()


@given(routings())
def test_sparse_is_dense_bit_for_bit(routing: Routing) -> None:
    """DISPATCH-5 under exact arithmetic, with the spec's gated experts: all experts on all tokens, masked."""
    x = random_rows(len(routing.ids), 2)
    experts = random_experts(routing.experts)
    sparse, dense = mixture(OPS, routing, experts, x), dense_mixture(OPS, routing, experts, x)
    assert (sparse == dense).all()
    assert not routing.kept.any() or (sparse != 0).any()


@pytest.mark.parametrize("name", ["mixtral", "switch", "gshard", "st-moe", "expert-choice", "deepseek-v3"])
def test_every_router_runs_sparse_as_dense(name: str) -> None:
    """DISPATCH-5 with the routers' own weights, 50 tokens, capacity in force."""
    rng = np.random.default_rng(3)
    logits, x, u = rng.standard_normal((50, 6)), rng.standard_normal((50, 3)), rng.random((50, 1))
    routing = {
        "mixtral": lambda: mixtral(OPS, logits, 2),
        "switch": lambda: switch(OPS, logits, 8),
        "gshard": lambda: gshard(OPS, logits, 12, u[:, 0]),
        "st-moe": lambda: st_moe(OPS, logits, 12, u),
        "expert-choice": lambda: expert_choice(OPS, logits, 9),
        "deepseek-v3": lambda: deepseek_v3(OPS, logits, 2, u[:6, 0], 3, 2, 2.5),
    }[name]()
    experts = random_experts(6)
    sparse, dense = mixture(OPS, routing, experts, x), dense_mixture(OPS, routing, experts, x)
    assert (sparse == dense).all()


def test_it_is_the_mixture_of_the_spec() -> None:
    """EXPERT-3, COMBINE-1: `run_experts` and `combine` of the spec give the same bits."""
    rng = np.random.default_rng(4)
    logits, x = rng.standard_normal((20, 4)), rng.standard_normal((20, 3))

    def weight(name: str, shape: tuple[int, int], seed: list[int]) -> Weight:
        values = np.random.default_rng(seed).standard_normal(shape)
        return Weight(name=name, shape=shape, dtype=np.float64, source=lambda: values, origin=name)

    made = tuple(
        Expert(w1=weight("w1", (4, 3), [e, 0]), w2=weight("w2", (3, 4), [e, 1]), w3=weight("w3", (4, 3), [e, 2]))
        for e in range(4)
    )  # fmt: skip
    routing = mixtral(OPS, logits, 2)
    expected = spec_combine(OPS, run_experts(OPS, made, x, routing.ids), routing.weights)
    functions = [lambda rows, expert=expert: run_expert(OPS, expert, rows)[3] for expert in made]
    assert (mixture(OPS, routing, functions, x) == expected).all()


def test_combine_takes_outputs_of_another_width() -> None:
    """DISPATCH-4: [n_e, D'] with D' not D; expert e answers with its own number and the row's sum."""
    routing = admit(OPS, np.array([[1, 0], [0, 1], [1, 0]]), np.array([[1.0, 2.0]] * 3), 2, 2)
    x = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    plan = make_plan(OPS, routing)
    outputs = [np.array([[float(e), sum(row), 0.0] for row in rows]) for e, rows in enumerate(dispatch(OPS, plan, x))]
    # token 0 first asks for 1, token 1 for 0, token 2 for 1; then token 0 asks for 0; there is room for no more
    expected = [[1 * 1 + 2 * 0, 3 + 2 * 3, 0], [0, 7, 0], [1, 11, 0]]
    assert combine(OPS, routing, plan, outputs).tolist() == expected


@given(routings())
def test_statistics_are_counts(routing: Routing) -> None:
    """LOAD-1 to LOAD-4, by a loop. The entropy may differ by 16 roundings."""
    found = load_statistics(OPS, routing)
    slots = [(t, j) for t, row in enumerate(routing.ids.tolist()) for j in range(len(row))]
    asked = Counter(int(routing.ids[s]) for s in slots if routing.asked[s])
    kept = Counter(int(routing.ids[s]) for s in slots if routing.kept[s])
    assert found.asked == tuple(asked[e] for e in range(routing.experts))
    assert found.kept == tuple(kept[e] for e in range(routing.experts))
    assert found.uncomputed == sum(not row.any() for row in routing.kept)
    total = sum(asked.values())
    if not total:
        assert (found.entropy, found.variation, found.drop_rate) == (0, 0, 0)
        return
    mean = total / routing.experts
    deviation = math.sqrt(sum((asked[e] - mean) ** 2 for e in range(routing.experts)) / routing.experts)
    assert found.drop_rate == (total - sum(kept.values())) / total
    assert float(found.variation) == pytest.approx(deviation / mean, rel=1e-12, abs=1e-12)
    entropy = -sum(n / total * math.log(n / total) for n in asked.values())
    assert float(found.entropy) == pytest.approx(entropy, rel=1e-14, abs=1e-15)


def test_statistics_at_their_ends() -> None:
    """LOAD-2, LOAD-3: even, and everything on one expert."""
    even = load_statistics(OPS, admit(OPS, np.array([[0], [1], [2], [3]]), np.ones((4, 1)), 4))
    assert (even.variation, even.drop_rate) == (0, 0)
    assert float(even.entropy) == math.log(4)
    one = load_statistics(OPS, admit(OPS, np.zeros((4, 1), np.int64), np.ones((4, 1)), 4, 1))
    assert (one.entropy, one.drop_rate, one.uncomputed) == (0, 0.75, 3)
    assert float(one.variation) == math.sqrt(3)


@pytest.mark.parametrize("ops", [NativeOps("float32"), NativeOps(), ExactOps(), BALLS])
def test_the_toy_of_the_article(ops: Any) -> None:
    """Two experts, x * 2 for even and x + 10 for odd integers: 5 gives exactly 15 in every arithmetic."""
    x = ops.array(np.array([[5.0], [4.0], [7.0], [0.0]]))
    parity = ops.array(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    routing = mixtral(ops, parity, 1)
    for layer in (mixture, dense_mixture):
        out = layer(ops, routing, [lambda rows: rows * 2, lambda rows: rows + 10], x)
        assert out[:, 0].tolist() == [15, 8, 17, 0]
