# SPDX-License-Identifier: Apache-2.0
"""Every router against an independent evaluation: plain Python, rational numbers where the equation allows.

A logit that is the logarithm of an integer n has exp n and, as n / (n + 1), a rational sigmoid: the weights that balls
enclose are then fractions, and equal integers are exact ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refmoe.arithmetic.ball import BallOps
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.weight import Weight
from refmoe.routers.literature.adapters import ADAPTERS
from refmoe.routers.literature.capacity import expert_capacity, queue
from refmoe.routers.literature.deepseek_v3 import deepseek_v3, update_bias
from refmoe.routers.literature.expert_choice import expert_choice
from refmoe.routers.literature.family import FAMILY, Settings, run_router
from refmoe.routers.literature.gshard import gshard
from refmoe.routers.literature.mixtral import mixtral
from refmoe.routers.literature.noisy_top_k import noisy_logits, noisy_top_k
from refmoe.routers.literature.record import Routing, gates
from refmoe.routers.literature.st_moe import st_moe
from refmoe.routers.literature.switch import switch
from refmoe.spec.router import route

Table = list[list[int]]
BALLS = BallOps()


def tables(least: int = 1, most: int = 5) -> st.SearchStrategy[Table]:
    """Integers [T, E], many of them equal."""
    return st.integers(least, most).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(1, 6) | st.integers(1, 60), min_size=experts, max_size=experts), min_size=1, max_size=7
        )
    )


def grid(rows: int, columns: int, numbers: st.SearchStrategy[int]) -> st.SearchStrategy[Table]:
    return st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


def logarithms(table: Table) -> Any:
    return np.array([[BALLS.flint.arb(n).log() for n in row] for row in table], dtype=object)


def largest(values: Any, k: int) -> list[int]:
    """The k largest, largest first, of equal ones the lower index, by a scan and not by a sort."""
    found: list[int] = []
    for _ in range(k):
        best = None
        for i, value in enumerate(values):
            if i not in found and (best is None or value > values[best]):
                best = i
        assert best is not None
        found.append(best)
    return found


def encloses(balls: Any, fractions: list[list[Fraction]]) -> bool:
    """Whether every ball holds its fraction, and is a small one."""
    assert [len(row) for row in balls.tolist()] == [len(row) for row in fractions]
    return all(
        ball.contains(BALLS.flint.arb(value.numerator) / value.denominator) and float(ball.rad()) < 1e-30
        for balls_row, row in zip(balls.tolist(), fractions, strict=True)
        for ball, value in zip(balls_row, row, strict=True)
    )


def agrees(routing: Routing, ids: Any, weights: Any, asked: Any, kept: Any) -> None:
    assert routing.ids.tolist() == ids
    assert routing.asked.tolist() == asked
    assert routing.kept.tolist() == kept
    assert encloses(routing.weights, weights)


@given(st.data(), tables())
def test_mixtral_is_the_rational_number(data: st.DataObject, table: Table) -> None:
    """ROUTE-2 to ROUTE-4."""
    k = data.draw(st.integers(1, len(table[0])))
    ids = [largest(row, k) for row in table]
    weights = [
        [Fraction(row[e], sum(row[i] for i in chosen)) for e in chosen] for row, chosen in zip(table, ids, strict=True)
    ]
    everything = [[True] * k] * len(table)
    agrees(mixtral(BALLS, logarithms(table), k), ids, weights, everything, everything)


@given(st.data(), tables(), st.integers(1, 4))
def test_switch_is_the_rational_number(data: st.DataObject, table: Table, capacity: int) -> None:
    """SWITCH-1 to SWITCH-3: the probability over all experts; the first C tokens of each expert."""
    load: dict[int, int] = {}
    ids, weights, kept = [], [], []
    for row in table:
        e = row.index(max(row))
        load[e] = load.get(e, 0) + 1
        ids.append([e])
        kept.append([load[e] <= capacity])
        weights.append([Fraction(row[e], sum(row)) if load[e] <= capacity else Fraction(0)])
    agrees(switch(BALLS, logarithms(table), capacity), ids, weights, [[True]] * len(table), kept)


def algorithm_1(table: Table, capacity: int, chance: list[Fraction]) -> Any:
    """GShard's algorithm 1, line by line."""
    c = [0] * len(table[0])
    experts = [largest(row, 2) for row in table]
    combine = [[Fraction(0)] * 2 for _ in table]
    asked = [[True, False] for _ in table]
    kept = [[False] * 2 for _ in table]
    for s, row in enumerate(table):
        g1, g2 = (Fraction(row[e], sum(row)) for e in experts[s])
        e1 = experts[s][0]
        if c[e1] < capacity:
            combine[s][0], kept[s][0] = g1 / (g1 + g2), True
        c[e1] += 1
    for s, row in enumerate(table):
        g1, g2 = (Fraction(row[e], sum(row)) for e in experts[s])
        g2, e2 = g2 / (g1 + g2), experts[s][1]
        asked[s][1] = 2 * g2 > chance[s]
        if c[e2] < capacity and 2 * g2 > chance[s]:
            combine[s][1], kept[s][1] = g2, True
        c[e2] += 1
    return experts, combine, asked, kept


@given(st.data(), tables(least=2), st.integers(1, 6))
def test_gshard_is_its_algorithm_1(data: st.DataObject, table: Table, capacity: int) -> None:
    """GSHARD-1 to GSHARD-5, with chance in sixty-fourths. The tie 2 * weight = chance, which balls cannot decide, is
    left out."""
    chance = data.draw(st.lists(st.integers(0, 63), min_size=len(table), max_size=len(table)))
    exact = [Fraction(u, 64) for u in chance]
    for row, u in zip(table, exact, strict=True):
        first, second = (row[e] for e in largest(row, 2))
        assume(2 * Fraction(second, first + second) != u)
    routing = gshard(BALLS, logarithms(table), capacity, BALLS.array(np.array(chance) / 64))
    agrees(routing, *algorithm_1(table, capacity, exact))


def test_a_refused_second_choice_takes_a_place_in_gshard_and_none_in_st_moe() -> None:
    """GSHARD-4, STMOE-3: token 0's second choice is refused, token 1 wants the same expert, which has room for one."""
    table = [[6, 1, 5], [6, 1, 5], [1, 60, 2]]
    chance = [Fraction(63, 64), Fraction(0), Fraction(63, 64)]
    routing = gshard(BALLS, logarithms(table), 1, BALLS.array(np.array([float(u) for u in chance])))
    agrees(routing, *algorithm_1(table, 1, chance))
    assert routing.asked.tolist() == [[True, False], [True, True], [True, False]]
    assert routing.positions[:, 1].tolist() == [0, 1, 2]
    assert not routing.kept[1, 1]
    uniforms = BALLS.array(np.array([[float(u)] for u in chance]))
    routing = st_moe(BALLS, logarithms(table), 1, uniforms, threshold=0.5)
    assert routing.asked.tolist() == [[True, False], [True, True], [True, False]]
    assert routing.positions[:, 1].tolist() == [-1, 0, -1]
    assert routing.kept[1, 1]


@given(tables(least=2), st.integers(1, 6))
def test_glam_is_gshard_without_chance(table: Table, capacity: int) -> None:
    """GSHARD-3: no uniform number refuses a second choice."""
    agrees(gshard(BALLS, logarithms(table), capacity), *algorithm_1(table, capacity, [Fraction(-1)] * len(table)))


@given(st.data(), tables(least=2), st.integers(1, 6))
def test_st_moe_refuses_below_the_threshold_and_keeps_the_place_free(
    data: st.DataObject, table: Table, capacity: int
) -> None:
    """STMOE-1 to STMOE-4."""
    k = data.draw(st.integers(1, len(table[0])))
    drawn = data.draw(grid(len(table), k - 1, st.integers(0, 63)))
    chance = np.array(drawn, np.int64).reshape(len(table), k - 1)
    threshold = Fraction(3, 8)
    ids = [largest(row, k) for row in table]
    weights = [[Fraction(row[e], sum(row[i] for i in c)) for e in c] for row, c in zip(table, ids, strict=True)]
    asked = [[True] * k for _ in table]
    kept = [[False] * k for _ in table]
    load = [0] * len(table[0])
    for j in range(k):
        for t, chosen in enumerate(ids):
            if j:
                u = Fraction(int(chance[t, j - 1]), 64)
                assume(weights[t][j] != threshold * u)
                asked[t][j] = weights[t][j] / threshold > u
            if asked[t][j]:
                kept[t][j] = load[chosen[j]] < capacity
                load[chosen[j]] += 1
    weights = [
        [w if keep else Fraction(0) for w, keep in zip(row, mask, strict=True)]
        for row, mask in zip(weights, kept, strict=True)
    ]
    uniforms = BALLS.array(chance / 64)
    agrees(st_moe(BALLS, logarithms(table), capacity, uniforms, k, 0.375), ids, weights, asked, kept)


@given(st.data(), tables())
def test_expert_choice_is_the_rational_number(data: st.DataObject, table: Table) -> None:
    """CHOICE-1 to CHOICE-3: per expert, the C tokens of the largest probability; equal fractions only in equal rows."""
    scores = [[Fraction(n, sum(row)) for n in row] for row in table]
    for e in range(len(table[0])):
        column = [(row[e], tuple(numbers)) for row, numbers in zip(scores, table, strict=True)]
        assume(len({value for value, _ in column}) == len(set(column)))
    capacity = data.draw(st.integers(1, len(table)))
    routing = expert_choice(BALLS, logarithms(table), capacity)
    chosen = [largest([row[e] for row in scores], capacity) for e in range(len(table[0]))]
    taken = [[t in chosen[e] for e in range(len(table[0]))] for t in range(len(table))]
    weights = [
        [s if goes else Fraction(0) for s, goes in zip(*rows, strict=True)] for rows in zip(scores, taken, strict=True)
    ]
    agrees(routing, [list(range(len(table[0])))] * len(table), weights, taken, taken)
    assert [[chosen[e].index(t) if taken[t][e] else -1 for e in range(len(chosen))] for t in range(len(table))] == [
        [p if p < capacity else -1 for p in row] for row in routing.positions.tolist()
    ]


@given(st.data(), st.sampled_from([(4, 1), (4, 2), (6, 3), (6, 2), (3, 3), (8, 4)]))
def test_deepseek_v3_is_the_rational_number(data: st.DataObject, shape: tuple[int, int]) -> None:
    """DEEPSEEK-1 to DEEPSEEK-6. Biases are sixty-fourths. Examples with accidentally equal fractions are left out."""
    experts, groups = shape
    per_group = experts // groups
    table = data.draw(st.lists(st.lists(st.integers(1, 9), min_size=experts, max_size=experts), min_size=1, max_size=4))
    bias = [Fraction(b, 64) for b in data.draw(st.lists(st.integers(-64, 64), min_size=experts, max_size=experts))]
    top_groups = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, top_groups * per_group))
    ids, weights = [], []
    for row in table:
        scores = [Fraction(n, n + 1) for n in row]
        biased = [s + b for s, b in zip(scores, bias, strict=True)]
        assume(len(set(biased)) == len(set(zip(row, bias, strict=True))))
        parts = [biased[g * per_group : (g + 1) * per_group] for g in range(groups)]
        best = [sum(sorted(part, reverse=True)[:2], Fraction(0)) for part in parts]
        assume(len(set(best)) == groups)
        stays = largest(best, top_groups)
        candidates = [e for e in range(experts) if e // per_group in stays]
        chosen = [candidates[i] for i in largest([biased[e] for e in candidates], k)]
        ids.append(chosen)
        weights.append([Fraction(5, 2) * scores[e] / sum(scores[i] for i in chosen) for e in chosen])
    ball_bias = BALLS.array([float(b) for b in bias])
    routing = deepseek_v3(BALLS, logarithms(table), k, ball_bias, groups, top_groups, 2.5)
    everything = [[True] * k] * len(table)
    agrees(routing, ids, weights, everything, everything)


def test_deepseek_v3_stays_in_its_groups_when_every_biased_score_is_negative() -> None:
    """DEEPSEEK-3: an expert of another group is excluded, and does not have score 0."""
    logits = np.array([[0.5, -1.0, 2.0, 1.0]])
    assert deepseek_v3(ExactOps(), logits, 2, np.full(4, -2.0), 2, 1).ids.tolist() == [[2, 3]]


def test_deepseek_v3_weighs_where_every_sigmoid_rounds_to_zero() -> None:
    """DEEPSEEK-5: sigmoid(-800) and sigmoid(-802) are 0 in float64; their ratio is exp(2)."""
    routing = deepseek_v3(ExactOps(), np.array([[-800.0, -802.0, -900.0]]), 2)
    assert routing.ids.tolist() == [[0, 1]]
    assert routing.weights[0, 0] / routing.weights[0, 1] == pytest.approx(math.exp(2), rel=1e-14)


def test_the_bias_of_deepseek_v3_moves_against_the_load() -> None:
    """DEEPSEEK-7: the bias falls above the mean load, rises below it, and stays at it."""
    moved = update_bias(ExactOps(), np.zeros(4), np.array([7, 3, 5, 5]), 0.25)
    assert moved.tolist() == [-0.25, 0.25, 0.0, 0.0]


@given(tables(), st.data())
def test_noisy_top_k_looks_at_the_noisy_logits(table: Table, data: st.DataObject) -> None:
    """NOISY-1, NOISY-2: softplus(0) is log 2, so noise n on log m gives log(m 2^n), whose weight is rational too."""
    experts = len(table[0])
    k = data.draw(st.integers(1, experts))
    noise = data.draw(grid(len(table), experts, st.integers(-3, 3)))
    pairs = [list(zip(*rows, strict=True)) for rows in zip(table, noise, strict=True)]
    values = [[Fraction(m) * Fraction(2) ** n for m, n in row] for row in pairs]
    for row, made_of in zip(values, pairs, strict=True):
        assume(len(set(row)) == len(set(made_of)))
    logits = logarithms(table)
    routing = noisy_top_k(BALLS, logits, logits * 0, BALLS.array(np.array(noise, float)), k)
    ids = [largest(row, k) for row in values]
    weights = [[row[e] / sum(row[i] for i in c) for e in c] for row, c in zip(values, ids, strict=True)]
    everything = [[True] * k] * len(table)
    agrees(routing, ids, weights, everything, everything)


def test_the_noise_is_scaled_by_softplus() -> None:
    """NOISY-1 at other noise logits, by the formula in plain Python."""
    found = noisy_logits(ExactOps(), np.array([[1.0, 2.0]]), np.array([[3.0, -4.0]]), np.array([[0.5, -2.0]]))
    assert found[0, 0] == pytest.approx(1 + 0.5 * math.log1p(math.exp(3)), rel=1e-15)
    assert found[0, 1] == pytest.approx(2 - 2 * math.log1p(math.exp(-4)), rel=1e-15)


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), max_size=9), st.data())
def test_places_are_counted_slot_by_slot(ids: list[list[int]], data: st.DataObject) -> None:
    """CAP-2, by counting; an uncounted slot has no place."""
    counted = [[data.draw(st.booleans()) for _ in row] for row in ids]
    places = [[-1, -1] for _ in ids]
    seen = [0] * 4
    for j in range(2):
        for t, row in enumerate(ids):
            if counted[t][j]:
                places[t][j] = seen[row[j]]
                seen[row[j]] += 1
    shape = (len(ids), 2)
    found = queue(NativeOps(), np.array(ids, np.int64).reshape(shape), 4, np.array(counted, bool).reshape(shape))
    assert found.tolist() == places


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "k", "expected"),
    [(16, 8, 1.0, 1, 2), (17, 8, 1.0, 1, 3), (100, 10, 1.1, 1, 11), (16, 8, 1.25, 2, 5), (1, 8, 0.5, 1, 1),
     (12, 4, Fraction(1, 3), 1, 1)],
)  # fmt: skip
def test_capacity_rounds_up_and_reads_decimals(tokens: int, experts: int, factor: Any, k: int, expected: int) -> None:
    """CAP-1: 1.1 * 100 / 10 is 11, though the float64 nearest to 1.1 is a little above it."""
    assert expert_capacity(tokens, experts, factor, k) == expected


def test_mixtral_is_the_router_of_the_spec() -> None:
    """One router, stated once: `refmoe.spec.router.route` on an identity router matrix."""
    logits = np.random.default_rng(5).standard_normal((40, 6))
    identity = Weight(name="gate", shape=(6, 6), dtype=np.float64, source=lambda: np.eye(6), origin="gate")
    for k in range(1, 7):
        ids, weights = route(ExactOps(), logits, identity, k)
        routing = mixtral(ExactOps(), logits, k)
        assert (routing.ids == ids).all()
        assert (routing.weights == weights).all()


def cases() -> list[tuple[str, Callable[[Any, Any, Any], Routing]]]:
    """Every router with every one of its arguments, as functions of ops, logits and a source of uniform numbers."""
    return [
        ("mixtral", lambda ops, x, _: mixtral(ops, x, 3)),
        ("switch", lambda ops, x, _: switch(ops, x, 4)),
        ("gshard", lambda ops, x, u: gshard(ops, x, 7, ops.array(u[:, 0]))),
        ("glam", lambda ops, x, _: gshard(ops, x, 7)),
        ("st-moe", lambda ops, x, u: st_moe(ops, x, 9, ops.array(u[:, :2]), 3)),
        ("expert-choice", lambda ops, x, _: expert_choice(ops, x, 6)),
        ("deepseek-v3", lambda ops, x, u: deepseek_v3(ops, x, 2, ops.array(u[0] - 0.5), 3, 2, 2.5)),
        ("noisy", lambda ops, x, u: noisy_top_k(ops, x, ops.array(u - 0.5), ops.array(u * 2 - 1), 2)),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "run"), cases(), ids=[name for name, _ in cases()])
def test_every_arithmetic_routes_alike(name: str, run: Any) -> None:
    """Float32, float64, exact and balls: the same decisions where there are no near ties; weights to 100 roundings."""
    rng = np.random.default_rng(7)
    logits, uniforms = rng.standard_normal((20, 6)).astype(np.float32).astype(np.float64), rng.random((20, 6))
    proven = run(BALLS, BALLS.array(logits), uniforms)
    for ops, epsilon in ((NativeOps("float32"), 2.0**-24), (NativeOps(), 2.0**-53), (ExactOps(), 2.0**-53)):
        routing = run(ops, ops.array(logits), uniforms)
        assert routing.weights.dtype == ops.dtype
        for field in ("ids", "asked", "kept", "positions"):
            assert (getattr(routing, field) == getattr(proven, field)).all(), field
        for value, ball in zip(routing.weights.ravel().tolist(), proven.weights.ravel(), strict=True):
            assert abs(BALLS.flint.arb(value) - ball) <= 100 * epsilon * ball


@pytest.mark.parametrize(("name", "run"), cases(), ids=[name for name, _ in cases()])
def test_every_record_is_consistent(name: str, run: Any) -> None:
    """The fields of `Routing` are as its docstrings promise."""
    rng = np.random.default_rng(8)
    ops = ExactOps()
    routing = run(ops, rng.standard_normal((20, 6)), rng.random((20, 6)))
    tokens, k = routing.ids.shape
    for field in ("weights", "asked", "kept", "positions"):
        assert getattr(routing, field).shape == (tokens, k)
    assert all(len(set(row)) == k and set(row) <= set(range(6)) for row in routing.ids.tolist())
    assert not (routing.kept & ~routing.asked).any()
    assert (routing.weights[~routing.kept] == 0).all()
    assert (routing.weights >= 0).all()
    dense = gates(ops, routing)
    for t in range(tokens):
        expected = [0.0] * 6
        for j in range(k):
            expected[routing.ids[t, j]] += routing.weights[t, j]
        assert dense[t].tolist() == expected


@pytest.mark.parametrize("name", [*ADAPTERS])
def test_an_adapter_is_a_plain_function(name: str) -> None:
    """NumPy in, ids and weights out. A token's result does not depend on others; float32 and bfloat16 are taken too."""
    logits = np.random.default_rng(9).standard_normal((33, 8)).astype(np.float32)
    ids, weights = ADAPTERS[name](logits)
    assert ids.dtype == np.int64
    assert weights.dtype == np.float64
    alone = [ADAPTERS[name](row[None]) for row in logits]
    assert (ids == np.concatenate([i for i, _ in alone])).all()
    assert (weights == np.concatenate([w for _, w in alone])).all()


@pytest.mark.parametrize("name", ["switch", "gshard", "st-moe"])
def test_an_adapter_with_a_capacity_clears_the_weights_of_the_dropped(name: str) -> None:
    """CAP-3: all ids stay, and at most C weights of an expert."""
    logits = np.random.default_rng(11).standard_normal((40, 4))
    free, limited = ADAPTERS[name](logits), ADAPTERS[name](logits, capacity=9)
    assert (free[0] == limited[0]).all()
    assert set(np.unique(limited[1] == free[1])) == {False, True}
    assert (limited[1][limited[1] != free[1]] == 0).all()
    assert max(((limited[0] == e) & (limited[1] > 0)).sum() for e in range(4)) == 9


def test_ties_go_to_the_lower_id_in_every_router() -> None:
    """ROUTE-3, SWITCH-1, GSHARD-1, STMOE-1, NOISY-2, DEEPSEEK-4; CHOICE-2 for tokens."""
    for name, adapter in ADAPTERS.items():
        ids, _ = adapter(np.zeros((3, 5)))
        assert ids.tolist() == [list(range(ids.shape[1]))] * 3, name
    assert expert_choice(ExactOps(), np.zeros((4, 3)), 2).kept.tolist() == [[True] * 3] * 2 + [[False] * 3] * 2


def test_an_expert_leaves_a_token_for_a_later_one() -> None:
    """CHOICE-4. Each expert takes one of two tokens. A likelier second token changes the experts of the first."""
    first = [3, 2]  # likelier with expert 0 than the other where that is [1, 1], less likely where it is [4, 1]
    for second, taken in (([1, 1], [True, False]), ([4, 1], [False, True])):
        routing = expert_choice(BALLS, logarithms([first, second]), 1)
        assert routing.kept[0].tolist() == taken
        assert routing.kept[1].tolist() == [not each for each in taken]


@pytest.mark.parametrize("name", [*FAMILY])
def test_the_family_runs_by_name_and_repeats_itself(name: str) -> None:
    """Equal seeds give equal results."""
    logits = np.random.default_rng(10).standard_normal((30, 4)) * 3
    first, second, third = (run_router(name, ExactOps(), logits, Settings(seed=seed)) for seed in (1, 1, 2))
    assert (first[0].weights == second[0].weights).all()
    assert first[1] == second[1]
    random = name in ("noisy-top-k", "gshard", "st-moe")
    assert (first[0].weights == third[0].weights).all() == (not random)


def test_the_noiseless_adapter_masks_experts_as_mixtral_does() -> None:
    """NOISY-2: an expert with logit -inf is never chosen before another, and gives no NaN."""
    logits = np.array([[1.0, -np.inf, 3.0, 2.0], [-np.inf, 0.0, -np.inf, 1.0]])
    for found, expected in zip(ADAPTERS["noisy-top-k"](logits), ADAPTERS["mixtral"](logits), strict=True):
        assert np.array_equal(found, expected)
