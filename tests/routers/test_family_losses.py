# SPDX-License-Identifier: Apache-2.0
"""The losses of the family at known values, the normal distribution, stochastic neurons, and the ids of clauses."""

from __future__ import annotations

import math
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.ball import BallOps
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.routers.literature import stochastic_neurons as neurons
from refmoe.routers.literature.deepseek_v3 import sequence_balance_loss
from refmoe.routers.literature.gshard import gshard_loss
from refmoe.routers.literature.losses import load_balancing_loss, router_z_loss
from refmoe.routers.literature.mixtral import mixtral
from refmoe.routers.literature.noisy_top_k import importance_loss, load, load_loss, noisy_top_k, squared_variation
from refmoe.routers.literature.normal import normal_cdf, softplus
from refmoe.routers.literature.st_moe import st_moe_loss
from refmoe.routers.literature.switch import switch_loss

ROUTING = Path(__file__).parent.parent.parent / "refmoe" / "routers" / "literature"
OPS: list[Any] = [NativeOps, ExactOps]
HALF_ULP = 2.0**-53


def arb(value: float) -> Any:
    """A float64 as a ball, at enough bits for the tests."""
    flint = BallOps(precision=2400).flint
    return flint.arb(value)


@pytest.fixture(autouse=True)
def usual_precision() -> Any:
    """Restore the global precision of balls to that of `BallOps`."""
    yield
    BallOps()


def test_every_clause_of_the_family_is_stated_once() -> None:
    """As in the spec, an id starts a docstring's line, and each family is numbered from 1 without gaps."""
    text = "\n".join(path.read_text() for path in ROUTING.glob("*.py"))
    stated = Counter(re.findall(r'^    (?:""")?([A-Z]+-\d+)  ', text, re.MULTILINE))
    assert set(stated.values()) == {1}
    families = {clause.partition("-")[0] for clause in stated}
    assert families >= {"AUX", "CAP", "DISPATCH", "SWITCH", "GSHARD", "STMOE", "CHOICE", "DEEPSEEK", "NOISY", "NEURON"}
    for family in families:
        numbers = sorted(int(clause.partition("-")[2]) for clause in stated if clause.startswith(family + "-"))
        assert numbers == list(range(1, len(numbers) + 1)), family


@pytest.mark.parametrize("ops", OPS)
def test_normal_cdf_is_within_a_few_roundings_of_one(ops: Any) -> None:
    """The error against Arb's erfc is 8 half-ulps of 1. Far out, it is relative: that of exp of a rounded square."""
    x = np.concatenate([np.linspace(-37, 9, 4001), [2.5, -2.5, np.nextafter(2.5, 3), 0.0, -0.0, 300.0, -300.0, 1e300]])
    for value, found in zip(x.tolist(), normal_cdf(ops(), x).tolist(), strict=True):
        true = (-arb(value) / arb(2).sqrt()).erfc() / 2 if abs(value) < 1000 else arb(float(value > 0))
        assert abs(arb(found) - true) <= 8 * HALF_ULP
        if abs(value) < 38:
            assert abs(arb(found) - true) <= (500 + value * value) * HALF_ULP * true


@pytest.mark.parametrize("ops", OPS)
def test_softplus_is_within_a_few_ulp(ops: Any) -> None:
    """Against Arb, far into the range where 1 + exp(x) rounds to 1."""
    x = np.concatenate([np.linspace(-700, 700, 1401), np.linspace(-2, 2, 101), [-36.7, -37.5]])
    for value, found in zip(x.tolist(), softplus(ops(), x).tolist(), strict=True):
        true = (1 + arb(value).exp()).log()
        assert abs(arb(found) - true) <= 8 * HALF_ULP * true


@pytest.mark.parametrize("ops", OPS)
def test_squared_variation_at_its_ends(ops: Any) -> None:
    """NOISY-3: 0 when all are equal, n - 1 when all but one are 0."""
    assert squared_variation(ops(), np.full(8, 0.375)) == 0
    assert squared_variation(ops(), np.array([0.0, 0.0, 3.0, 0.0])) == 3


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.integers(1, 4))
def test_importance_is_the_rational_number(row: list[int], tokens: int) -> None:
    """NOISY-4 with k = E: the weights are the whole softmax, of the same row for every token."""
    ops = BallOps()
    logits = np.array([[ops.flint.arb(n).log() for n in row]] * tokens, dtype=object)
    routing = noisy_top_k(ops, logits, logits * 0, logits * 0, len(row))
    total, mean = sum(row), Fraction(1, len(row))
    expected = sum((Fraction(n, total) - mean) ** 2 for n in row) / len(row) / mean**2
    assert importance_loss(ops, routing).contains(ops.flint.arb(expected.numerator) / expected.denominator)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_load_is_its_definition(ops: Any, k: int) -> None:
    """NOISY-5, NOISY-6, by removing the component and sorting the others."""
    rng = np.random.default_rng(k)
    logits, noise_logits, noise = (rng.standard_normal((9, 5)) for _ in range(3))
    expected = np.zeros(5)
    for x, s, z in zip(logits.tolist(), noise_logits.tolist(), noise.tolist(), strict=True):
        deviation = [math.log1p(math.exp(v)) for v in s]
        noisy = [a + b * c for a, b, c in zip(x, z, deviation, strict=True)]
        for e in range(5):
            others = sorted(noisy[:e] + noisy[e + 1 :], reverse=True)
            expected[e] += math.erfc(-(x[e] - others[k - 1]) / deviation[e] / math.sqrt(2)) / 2 if k < 5 else 1
    found = load(ops(), logits, noise_logits, noise, k)
    assert (abs(found - expected) <= 2000 * HALF_ULP * 9).all()
    variation = load_loss(ops(), logits, noise_logits, noise, k)
    assert abs(variation - (expected.var() / expected.mean() ** 2)) < 1e-12


def test_load_and_importance_vanish_when_experts_are_alike() -> None:
    """NOISY-4, NOISY-7: each of three tokens prefers another of three experts, by the same logits."""
    logits = np.array([[1.0, 0.5, 0.0], [0.5, 0.0, 1.0], [0.0, 1.0, 0.5]])
    routing = noisy_top_k(ExactOps(), logits, logits * 0, logits * 0, 2)
    assert importance_loss(ExactOps(), routing) < 1e-30
    assert load_loss(ExactOps(), logits, logits * 0, logits * 0, 2) < 1e-30


@pytest.mark.parametrize("ops", [*OPS, BallOps])
def test_balance_losses_at_their_uniform_values(ops: Any) -> None:
    """SWITCH-4 is 1, GSHARD-6 is 1 / E^2, DEEPSEEK-8 is 1: equal logits, E a power of two, so nothing rounds."""
    made = ops()
    flat = made.array(np.full((8, 4), 0.5))
    assert switch_loss(made, flat) == 1
    assert gshard_loss(made, flat) == 1 / 16
    even = made.array(np.full((4, 4), -0.25) + 0.5 * np.eye(4))
    assert float(abs(sequence_balance_loss(made, even, 1) - 1)) < 1e-15


def test_balance_losses_at_their_greatest() -> None:
    """All tokens certain of one expert: E, 1 / E, and E / k of DeepSeek's."""
    certain = np.array([[300.0, 0.0, 0.0, 0.0]] * 5) - 150
    assert switch_loss(ExactOps(), certain) == pytest.approx(4, abs=1e-12)
    assert gshard_loss(ExactOps(), certain) == pytest.approx(1 / 4, abs=1e-12)
    assert sequence_balance_loss(ExactOps(), certain, 1) == pytest.approx(4, abs=1e-12)


def test_deepseek_sequence_balance_is_the_rational_number() -> None:
    """DEEPSEEK-8: scores n / (n + 1)."""
    ops = BallOps()
    table = [[1, 2, 4, 8], [9, 3, 5, 2], [7, 1, 6, 3]]
    logits = np.array([[ops.flint.arb(n).log() for n in row] for row in table], dtype=object)
    scores = [[Fraction(n, n + 1) for n in row] for row in table]
    chosen = [sorted(range(4), key=lambda e, row=row: -row[e])[:2] for row in scores]
    f = [Fraction(4, 2 * 3) * sum(e in ids for ids in chosen) for e in range(4)]
    p = [sum(row[e] / sum(row) for row in scores) / 3 for e in range(4)]
    expected = sum((a * b for a, b in zip(f, p, strict=True)), Fraction(0))
    loss = sequence_balance_loss(ops, logits, 2)
    assert loss.contains(ops.flint.arb(expected.numerator) / expected.denominator)


@pytest.mark.parametrize("ops", OPS)
def test_st_moe_adds_its_two_losses(ops: Any) -> None:
    """STMOE-5."""
    logits = np.random.default_rng(3).standard_normal((9, 5))
    expected = 0.01 * load_balancing_loss(ops(), [logits], 1) + 0.001 * router_z_loss(ops(), logits)
    assert abs(st_moe_loss(ops(), logits) - expected) <= 4 * HALF_ULP * expected


def test_the_switch_loss_is_that_of_mixtral_with_one_choice() -> None:
    """SWITCH-4 counts the router's choices."""
    logits = np.random.default_rng(4).standard_normal((40, 5))
    ids = mixtral(ExactOps(), logits, 1).ids[:, 0]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = 5 * (np.bincount(ids, minlength=5) / 40 * p.mean(axis=0)).sum()
    assert switch_loss(ExactOps(), logits) == pytest.approx(expected, rel=1e-13)


probabilities = st.fractions(min_value=Fraction(1, 50), max_value=Fraction(49, 50), max_denominator=50)


@given(probabilities, st.integers(-9, 9), st.integers(-9, 9), st.integers(-9, 9))
def test_the_estimator_of_a_binary_neuron_is_unbiased(p: Fraction, loss_0: int, loss_1: int, baseline: int) -> None:
    """NEURON-2, NEURON-5: its expectation over h is dE/da = p (1 - p) (loss_1 - loss_0), whatever the baseline."""
    ops = BallOps()
    a = np.array([ops.flint.arb(p.numerator) / (p.denominator - p.numerator)], dtype=object)
    a = ops.log(a)  # sigmoid(log(p / (1 - p))) = p
    outcomes = ((0, loss_0), (1, loss_1))
    estimates = [neurons.unbiased(ops, a, ops.array([h]), ops.array([loss]), baseline)[0] for h, loss in outcomes]
    exact = ops.flint.arb(p.numerator) / p.denominator
    expectation = estimates[1] * exact + estimates[0] * (1 - exact)
    assert (expectation - exact * (1 - exact) * (loss_1 - loss_0)).contains(0)


@pytest.mark.parametrize("ops", OPS)
def test_the_best_baseline_has_the_least_variance(ops: Any) -> None:
    """NEURON-6: over samples with known losses, moving the baseline either way raises the mean square."""
    rng = np.random.default_rng(6)
    a = np.full((400, 1), 0.7)
    h = neurons.stochastic_binary(ops(), a, rng.random((400, 1)))
    loss = 5 + 2 * h + rng.standard_normal((400, 1))
    best = neurons.best_baseline(ops(), a, h, loss)
    square = [(neurons.unbiased(ops(), a, h, loss, best + shift) ** 2).mean() for shift in (0.0, 0.1, -0.1)]
    assert square[0] < min(square[1:])
    assert (neurons.unbiased(ops(), a, h, loss, 0.0) ** 2).mean() > square[0]


@pytest.mark.parametrize("ops", [*OPS, BallOps])
def test_stochastic_neurons_forward(ops: Any) -> None:
    """NEURON-1, NEURON-2, NEURON-7, NEURON-9 at values where nothing rounds: sigmoid(0) is 1/2; a tie is 0."""
    made = ops()
    zero = made.array([0.0, 0.0, 0.0])
    u = made.array([0.25, 0.5, 0.75])
    assert neurons.hard_threshold(made, made.array([-1.0, 0.0, 2.0])).tolist() == [0, 0, 1]
    assert neurons.stochastic_binary(made, zero, u).tolist() == [1, 0, 0]
    assert neurons.noisy_rectifier(made, made.array([-1.0, 1.0]), made.array([0.5, 0.5])).tolist() == [0, 1.5]
    smooth = neurons.stochastic_times_smooth(made, zero, u)
    assert [float(value) for value in smooth] == [math.sqrt(0.5), math.sqrt(0.5), 0.0]


def test_gradient_estimators() -> None:
    """NEURON-3, NEURON-4, NEURON-8, NEURON-10; the last three against differences of the forward function."""
    ops = ExactOps()
    a, z, u = np.array([-0.5, 0.3, 1.2]), np.array([0.9, -0.1, -2.0]), np.array([0.9, 0.2, 0.7])
    upstream = np.array([2.0, -3.0, 0.5])
    step = 2.0**-20
    assert (neurons.straight_through(ops, a, upstream) == upstream).all()
    slope = (ops.sigmoid(a + step) - ops.sigmoid(a - step)) / (2 * step)
    assert neurons.straight_through_sigmoid(ops, a, upstream) == pytest.approx(upstream * slope, rel=1e-8)
    for forward, gradient, chance in (
        (neurons.noisy_rectifier, neurons.noisy_rectifier_gradient, z),
        (neurons.stochastic_times_smooth, neurons.stochastic_times_smooth_gradient, u),
    ):
        slope = (forward(ops, a + step, chance) - forward(ops, a - step, chance)) / (2 * step)
        assert gradient(ops, a, chance, upstream) == pytest.approx(upstream * slope, rel=1e-8)
    assert (neurons.noisy_rectifier_gradient(ops, a, z, upstream) == [2.0, -3.0, 0.0]).all()


def test_stochastic_times_smooth_has_the_sigmoid_as_its_mean() -> None:
    """NEURON-9: over an even grid of u the mean is sqrt(p) times the share of u below sqrt(p)."""
    ops = ExactOps()
    u = (np.arange(4096) + 0.5) / 4096
    for a in (-2.0, 0.0, 1.5):
        mean = neurons.stochastic_times_smooth(ops, np.full(4096, a), u).mean()
        assert mean == pytest.approx(1 / (1 + math.exp(-a)), abs=1 / 4096)
