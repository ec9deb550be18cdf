# SPDX-License-Identifier: Apache-2.0
"""AUX-1 to AUX-8 against transformers, against rational numbers, between arithmetics, and at their known values.

`tests/vectors/test_loss_vectors.py` holds the functions against the tables of `golden/vectors/losses.json`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.ball import BallOps
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.routers.literature.losses import load_balancing_loss, router_z_loss

native: Any = NativeOps  # typed as Any, because each kind of ops annotates its own weights
balls: Any = BallOps
OPS: list[Any] = [NativeOps, ExactOps]


def random_layers(seed: int, layers: int, tokens: int, experts: int) -> list[Array]:
    """Distinct logits that are exact in float32."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((tokens, experts)).astype(np.float32).astype(np.float64) for _ in range(layers)]


def random_mask(seed: int, sequences: int, positions: int) -> Array:
    """A mask of right padding, in which each sequence has a length of its own, 1 or more."""
    lengths = np.random.default_rng(seed).integers(1, positions + 1, sequences)
    return np.asarray(np.arange(positions) < lengths[:, None])


# The relative error of float32 for a loss whose terms are all positive. Every number is a sum of at most n = 240
# rows, so n + 8 roundings of 2^-24 bound it in any order of summation: exp and the division of the softmax are within
# 2 ulp each, and f, P, their product and the sum over the experts round once each.
def float32_bound(rows: int, experts: int) -> float:
    return (rows + 2 * experts + 16) * 2.0**-24


@pytest.mark.engines
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("layers", "experts", "k"), [(1, 8, 2), (3, 8, 2), (2, 5, 1), (4, 4, 3), (2, 3, 3)])
def test_load_balancing_is_that_of_transformers(layers: int, experts: int, k: int, masked: bool) -> None:
    """AUX-1 to AUX-5: several layers, several sequences of different lengths, in float32 there and float64 here."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    for seed in range(10):
        tables = random_layers(seed, layers, 4 * 15, experts)
        mask = random_mask(seed, 4, 15) if masked else None
        in_torch: Any = tuple(torch.tensor(layer, dtype=torch.float32) for layer in tables)
        torch_mask = None if mask is None else torch.tensor(mask).long()
        theirs = load_balancing_loss_func(in_torch, experts, k, torch_mask)
        ours = load_balancing_loss(native(), tables, k, None if mask is None else mask.ravel())
        assert abs(float(theirs) - ours) <= float32_bound(layers * 60, experts) * ours
        if masked:  # the mask changes the loss by more than the bound
            unmasked = load_balancing_loss(native(), tables, k)
            assert abs(unmasked - ours) > float32_bound(layers * 60, experts) * ours or k == experts


@pytest.mark.engines
def test_with_one_choice_it_is_the_loss_of_switch() -> None:
    """Fedus et al. 2021, eq. 4 to 6, as transformers computes it for Switch Transformers."""
    import torch
    from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

    for seed in range(10):
        (table,) = random_layers(seed, 1, 40, 6)
        probabilities = torch.softmax(torch.tensor(table), dim=-1)
        theirs = load_balancing_loss_func(probabilities[None], probabilities.argmax(dim=-1)[None])
        ours = load_balancing_loss(native(), [table], 1)
        assert abs(float(theirs) - ours) <= float32_bound(40, 6) * ours  # transformers counts in float32


@pytest.mark.engines
def test_z_loss_is_that_of_transformers() -> None:
    """AUX-6, in float64 on both sides: 40 squares, each within a few ulp."""
    import torch
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    for seed in range(10):
        (table,) = random_layers(seed, 1, 40, 6)
        theirs = float(router_z_loss_func(torch.tensor(table)[None]))
        assert abs(theirs - router_z_loss(native(), table)) <= 100 * 2.0**-53 * theirs


weights = st.integers(1, 5).flatmap(
    lambda experts: st.lists(st.lists(st.integers(1, 30), min_size=experts, max_size=experts), min_size=1, max_size=6)
)


def largest(row: list[int], k: int) -> list[int]:
    """The ids of the k largest, the lower id on ties."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


@given(st.data(), weights)
def test_load_balancing_is_the_rational_number(data: st.DataObject, table: list[list[int]]) -> None:
    """AUX-1 to AUX-3, AUX-5: logits that are logarithms of integers have rational probabilities.

    The balls of their logarithms enclose the loss that Fractions give, and equal integers give equal balls: ties.
    """
    ops = balls()
    tokens, experts = len(table), len(table[0])
    k = data.draw(st.integers(1, experts))
    mask = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
    rows = [row for row, counts in zip(table, mask, strict=True) if counts]
    chosen = [largest(row, k) for row in rows]
    f = [Fraction(sum(e in ids for ids in chosen), len(rows)) for e in range(experts)]
    p = [sum((Fraction(row[e], sum(row)) for row in rows), Fraction(0)) / len(rows) for e in range(experts)]
    expected = experts * sum((a * b for a, b in zip(f, p, strict=True)), Fraction(0))

    logits = np.array([[ops.flint.arb(n).log() for n in row] for row in table], dtype=object)
    loss = load_balancing_loss(ops, [logits], k, np.array(mask))
    assert loss.contains(ops.flint.arb(expected.numerator) / expected.denominator)
    assert float(loss.rad()) < 1e-30


@given(weights)
def test_z_loss_is_the_square_of_the_logarithm_of_the_sum(table: list[list[int]]) -> None:
    """AUX-6: the logits log n have the log-sum-exp log(sum of n)."""
    ops = balls()
    logits = np.array([[ops.flint.arb(n).log() for n in row] for row in table], dtype=object)
    squares = [ops.flint.arb(sum(row)).log() ** 2 for row in table]
    assert router_z_loss(ops, logits).overlaps(sum(squares, ops.flint.arb(0)) / len(table))
    assert float(router_z_loss(ops, logits).rad()) < 1e-30


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_both_losses_lie_in_the_balls(ops: Any, k: int) -> None:
    """The float64 arithmetics are within 100 roundings of the proven values; they make about 60."""
    arb = balls()
    layers = random_layers(k, 2, 12, 5)
    mask = random_mask(k, 3, 4).ravel()
    proven = load_balancing_loss(arb, [arb.array(layer) for layer in layers], k, mask)
    value = load_balancing_loss(ops(), layers, k, mask)
    assert abs(arb.flint.arb(float(value)) - proven) < 100 * 2.0**-53 * proven
    proven = router_z_loss(arb, arb.array(layers[0]), mask)
    assert abs(arb.flint.arb(float(router_z_loss(ops(), layers[0], mask))) - proven) < 100 * 2.0**-53 * proven


@pytest.mark.parametrize("ops", [*OPS, balls])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_uniform_probabilities_give_k_exactly(ops: Any, k: int) -> None:
    """AUX-1: with E a power of two no operation rounds. The tie rule sends all tokens to the first k experts."""
    made = ops()
    assert load_balancing_loss(made, [made.array(np.full((6, 4), 1.5))], k) == k


def test_balanced_counts_give_k() -> None:
    """AUX-1: as f is uniform, P need not be: expert 0 is chosen with certainty, expert 1 barely."""
    loss = load_balancing_loss(balls(), [balls().array([[9.0, 0.0], [0.0, 0.0625]])], 1)
    assert loss.contains(1)
    assert float(loss.rad()) < 1e-30


def test_k_is_no_lower_bound_and_seven_eighths_is_approached() -> None:
    """The docstring's example: three tokens barely choose expert 0, one is certain of expert 1."""
    barely, certain = 2.0**-30, 60.0
    loss = load_balancing_loss(native(), [np.array([[barely, 0.0]] * 3 + [[0.0, certain]])], 1)
    assert abs(loss - 0.875) < 1e-9


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.data())
def test_one_token_alone_has_a_loss_of_k_or_more(row: list[float], data: st.DataObject) -> None:
    """For one token f and P have the same order (Chebyshev). E bounds every loss; 1e-12 covers float64's roundings."""
    k = data.draw(st.integers(1, len(row)))
    loss = load_balancing_loss(native(), [np.array([row])], k)
    assert k * (1 - 1e-12) <= loss <= len(row) * (1 + 1e-12)


def test_all_tokens_certain_of_the_same_experts_tend_to_e() -> None:
    """The supremum, for k = 1 and k = 2."""
    assert load_balancing_loss(native(), [np.array([[80.0, 0.0, 0.0]] * 5)], 1) == pytest.approx(3, abs=1e-12)
    assert load_balancing_loss(native(), [np.array([[80.0, 79.0, 0.0]] * 5)], 2) == pytest.approx(3, abs=1e-12)


@pytest.mark.parametrize("ops", OPS)
def test_a_constant_added_moves_the_z_loss_alone(ops: Any) -> None:
    """AUX-6, AUX-7. Integers and a shift by 1024 are exact, so the load-balancing loss keeps its bits."""
    table = np.array([[3.0, 1.0, 0.0], [-2.0, 4.0, 5.0]])
    before, after = (load_balancing_loss(ops(), [table + shift], 2) for shift in (0.0, 1024.0))
    assert before == after
    assert router_z_loss(ops(), table) < 30
    assert router_z_loss(ops(), table + 1024.0) > 1024.0**2


@pytest.mark.parametrize("ops", OPS)
def test_z_loss_at_its_least_value_and_far_away(ops: Any) -> None:
    """AUX-6, AUX-7: 0 where the exponentials sum to 1 (here to within a rounding), and finite where exp is not."""
    assert abs(router_z_loss(ops(), np.full((3, 4), -np.log(4.0)))) < 1e-31
    assert router_z_loss(ops(), np.array([[1e5, 0.0], [-1e5, -2e5]])) == 1e10
