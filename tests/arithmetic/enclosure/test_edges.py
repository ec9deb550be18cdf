# SPDX-License-Identifier: Apache-2.0
"""Cuts, exact values, what is not finite, what overflows, and the rotary table."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.enclosure.array import Enclosure, concatenate
from refmoe.arithmetic.formats import BFLOAT16, FLOAT32, FLOAT64, nearest, ulp
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from tests.arithmetic.enclosure.legal import KINDS, LegalOps, draw
from tests.arithmetic.enclosure.rules import BALL, FORMATS, NAMES, RULES, inside


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), owed=st.booleans())
def test_a_coarser_cut_never_narrows(seed: int, kind: str, owed: bool) -> None:
    rng = np.random.default_rng(seed)
    mid = draw(rng, kind, (20,), FLOAT64)
    x = Enclosure(mid, np.abs(mid) * 1e-9, (mid * 1e-9) ** 2, accumulation=FLOAT32, owed=owed)
    results = [x.cut(format) for format in (FLOAT64, FLOAT32, BFLOAT16)[owed:]]
    for fine, coarse in pairwise(results):
        assert (coarse.r >= fine.r * (1 - 1e-12)).all()
        assert (coarse.v >= fine.v * (1 - 1e-12)).all()


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), any_scale=st.booleans())
def test_a_cut_contains_the_rounded_and_the_unrounded_value(seed: int, kind: str, any_scale: bool) -> None:
    """At any scale from one up too: rounded before it is divided."""
    rng = np.random.default_rng(seed)
    for format in FORMATS[:3]:
        mid = draw(rng, kind, (50,), FLOAT64) * rng.choice([1.0, format.tiny, 2.0**format.exponent_max])
        radius = np.abs(mid) * rng.choice([0.0, 2.0**-30, 0.3], mid.shape)
        x = Enclosure(mid, radius).cut(format, any_scale)
        for off in (-1, 0, 1):
            point = mid + off * radius
            scale = rng.uniform(1, 9) if any_scale else 1.0
            rounded = nearest(point * scale, format) / scale
            reached = np.abs(rounded - mid) <= x.r * (1 + 2.0**-40)
            overflows = ~np.isfinite(rounded) if any_scale else np.zeros(50, bool)
            assert (reached | overflows | np.isinf(x.r)).all()
            assert (np.abs(point - mid) <= x.r * (1 + 2.0**-40)).all()
            if not off:  # one rounding is a uniform error, at most sqrt(3) standard deviations
                with np.errstate(invalid="ignore"):
                    assert ((np.abs(rounded - mid) <= 1.8 * np.sqrt(x.v)) | overflows | np.isinf(x.r)).all()


def test_a_value_that_the_dtype_holds_is_not_moved() -> None:
    x = Enclosure(np.array([0.0, 1.5, -(2.0**-130)])).cut(BFLOAT16)
    assert x.radius is None
    assert x.variance is None


def test_a_sum_of_two_stored_values_has_one_legal_bit_pattern() -> None:
    """The residual in float32: the sum is exact in binary64 or known to a step of it, and rounds once."""
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(20000).astype(np.float32) * 2.0 ** rng.integers(-9, 9, 20000) for _ in "ab")
    a, b = a.astype(np.float32), b.astype(np.float32)
    x = Enclosure(a, accumulation=FLOAT32) + Enclosure(b, accumulation=FLOAT32)
    assert x.owed
    with np.errstate(all="ignore"):
        low, high = nearest(x.mid - x.r, FLOAT32), nearest(x.mid + x.r, FLOAT32)
    assert np.array_equal(low, high)
    assert np.array_equal(low, (a + b).astype(np.float64))


def test_a_product_that_is_stored_in_the_accumulators_dtype_rounds_once() -> None:
    rng = np.random.default_rng(1)
    a, b = (Enclosure(nearest(rng.standard_normal(1000), FLOAT32)) for _ in "ab")
    product = (a * b).cut(FLOAT32)
    assert (product.r <= ulp(product.mid, FLOAT32) / 2 * (1 + 2.0**-20)).all()


def test_a_sum_knows_its_own_rounding() -> None:
    a, b = 1.0, 2.0**-60
    x = Enclosure([a]) + Enclosure([b])
    assert Fraction(float(x.r[0])) >= abs(Fraction(a) + Fraction(b) - Fraction(float(x.mid[0]))) > 0
    assert (Enclosure([1.0]) + Enclosure([2.0])).r[0] == 0


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_has_no_bound_and_warns_nobody(bad: float, rule: str) -> None:
    for name in NAMES:
        ops = EnclosureOps(policy(name))
        x, y = np.array([[1.0, bad, 2.0]]), np.array([[1.0, 0.0, 3.0]])
        x, y = (Enclosure(part, accumulation=ops.policy.accumulation) for part in (x, y))
        for result in (RULES[rule](ops, x, y), RULES[rule](ops, y, x)):
            lost = ~np.isfinite(result.mid)
            assert np.isinf(np.broadcast_to(result.settle().r, result.shape)[lost]).all()
            assert not np.isnan(result.settle().r).any()
            assert not np.isnan(result.settle().v).any()


def test_overflow_in_the_accumulator_has_no_bound() -> None:
    """2^100 is a float32, its square is none; and partial sums may leave the range that their sum is in."""
    ops = EnclosureOps(policy("float32"))
    x = Enclosure(np.array([[2.0**100, 1.0]]))
    assert np.isinf((x * x).settle().r).tolist() == [[True, False]]
    assert np.isinf(ops.sum(x * x, -1).r).all()
    row = Enclosure(np.array([[2.0**127, 2.0**127, -(2.0**127)]]))
    assert np.isinf(ops.sum(row, -1).r).all()
    assert np.isinf(ops.matmul(row, Enclosure(np.ones((3, 1)))).r).all()
    assert ops.events


def test_a_divisor_that_may_be_zero_gives_no_bound() -> None:
    x = Enclosure(np.ones(3)) / Enclosure(np.array([1.0, 1.0, 0.0]), np.array([0.5, 1.0, 0.1]), np.full(3, 0.1))
    assert np.isinf(x.r).tolist() == [False, True, True]
    assert np.isinf(x.v).tolist() == [True, True, True]


def test_a_root_contains_the_roots_of_both_ends() -> None:
    m, r = np.array([1.0, 1.0, 1e-9, 0.0]), np.array([0.9, 1.0, 1.0, 0.25])
    root = EnclosureOps(policy("float64")).sqrt(Enclosure(m, r, r**2 / 3, accumulation=FLOAT64))
    for end in (np.maximum(m - r, 0), m + r):
        assert (np.abs(np.sqrt(end) - root.mid) <= root.r).all()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_router_weights_may_come_from_stored_probabilities(stored: str) -> None:
    """Of all experts, then renormalised; the smallest are subnormal float16."""
    rng, p = np.random.default_rng(1), policy(f"hf-bfloat16+router.probs={stored}")
    for k in (1, 2, 4):
        logits = nearest(rng.standard_normal((2000, 8)) * rng.choice([0.1, 1, 5], (2000, 1)), FLOAT32)
        experts = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
        found = EnclosureOps(p).weigh(Enclosure(logits), experts)
        for _ in range(4):
            weights = LegalOps(p, rng).weigh(logits.astype(np.float32), experts)
            error = np.abs(weights - found.mid)
            assert (error <= found.r).all()
            assert (error <= 6 * np.sqrt(found.v)).all()


def test_moving_elements_keeps_all_their_parts() -> None:
    """Slices, transposes and concatenation of views that are not contiguous."""
    rng = np.random.default_rng(1)
    parts = [rng.random((4, 6))[:, ::2] for _ in range(4)]
    x = Enclosure(parts[0], parts[1], parts[2], accumulation=FLOAT32, owed=True, bias=parts[3])
    moved = concatenate([x.transpose(1, 0)[1:], x.transpose(1, 0)[:1]], 0)
    for name, part in zip(("mid", "radius", "variance", "bias"), parts, strict=True):
        assert np.array_equal(getattr(moved, name), part.T[[1, 2, 0]])
    assert moved.owed
    mixed = concatenate([x, Enclosure(np.ones((4, 3)))], 0)
    assert not mixed.owed
    assert (mixed.radius[:4] > x.radius).all()
    assert (mixed.radius[4:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("last", [1, 255, 2048, 32767, 131071])
def test_the_rotary_table_contains_its_angles(name: str, last: int) -> None:
    ops, positions = EnclosureOps(policy(name)), np.array([0, 1, last])
    for found, wanted in zip(
        ops.unit_circle(positions, 1e6, range(0, 64, 2), 64), BALL.unit_circle(positions, 1e6, range(0, 64, 2), 64),
        strict=True,
    ):  # fmt: skip
        assert inside(found, wanted)
        assert ((found.v > 0) & (found.r >= np.sqrt(found.v))).all()


def test_the_rotary_table_allows_every_angle_within_the_budget() -> None:
    """At both ends: also where the slope is nearly zero, and the error of the second order."""
    p, rng = policy("float32"), np.random.default_rng(1)
    positions, numerators = rng.integers(0, 131072, 2000), np.arange(2, 64, 2)
    logarithms = numerators / 64 * np.log(1e6)
    relative = (1 + (p.angles.constant + p.angles.slope * logarithms) * 2.0**-24) * (1 + 2.0**-24)
    angles = positions[:, None] * np.exp(-logarithms)
    for found, function in zip(
        EnclosureOps(p).unit_circle(positions, 1e6, numerators.tolist(), 64), (np.cos, np.sin), strict=True
    ):
        for end in (relative, 1 / relative):
            last = np.sign(function(angles * end) - found.mid) * 0.999 * p.circle.constant * 2.0**-24
            assert (np.abs(function(angles * end) + last - found.mid) <= found.r + 1e-10).all()
