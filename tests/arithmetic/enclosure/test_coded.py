# SPDX-License-Identifier: Apache-2.0
"""Products of codes: every order of the parts of a sum, every choice of codes, and every input within its radius."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import permutations
from itertools import product as combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.codes import FREE_CODES, Codes, Factors, InputFormat, quantise
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.coded import (
    candidates,
    coded_product,
    contested_rows,
    in_codes,
    left_factor,
    with_choices,
)
from refmoe.arithmetic.formats import FLOAT16, FLOAT32, nearest
from refmoe.profiles.inputs import input_formats

WIDTH, BLOCKS = 4, 3
SMALL = {
    name: replace(input_formats()[name], block=WIDTH, run=WIDTH)
    for name in ("q8_0", "q8_0-half-away", "q8_1", "q8_k", "q8_2")
}
KEPT = {name: replace(input_formats()[name], block=WIDTH) for name in ("q8_0", "q4_0", "q8_2")} | {
    name: input_formats()[name]
    for name in (
        "int8-token",
        "int8-token-simulated",
        "e4m3-token",
        "e4m3-token-simulated",
        "e4m3-cache",
        "e5m2-cache",
        "e4m3-cache-truncated",
        "e5m2-cache-truncated",
    )
}
"""Formats that a cache may have, and their codes of other kinds."""
single = np.float32


@dataclass(frozen=True)
class Matrix:
    """One row of a quantised matrix, as an engine holds it."""

    codes: Any
    """Integers [blocks, width]"""
    scales: Any
    """float32 values of float16, [blocks]"""
    offsets: Any
    """The same, or None."""

    def factors(self) -> Factors:
        terms = (self.codes * self.scales[:, None].astype(np.float64)).reshape(1, -1)
        return Factors(terms=terms, offsets=None if self.offsets is None else self.offsets[None].astype(np.float64))


def matrix(rng: np.random.Generator, offsets: bool) -> Matrix:
    def some() -> Any:
        return nearest(rng.standard_normal(BLOCKS) * 2.0 ** rng.integers(-3, 4, BLOCKS), FLOAT16).astype(single)

    return Matrix(rng.integers(-31, 32, (BLOCKS, WIDTH)), some(), some() if offsets else None)


def inputs(rng: np.random.Generator, boundaries: int) -> Any:
    """A row [1, n] of which some values lie within two float32 values of a boundary between codes."""
    x = (rng.standard_normal((BLOCKS, WIDTH)) * 2.0 ** rng.integers(-9, 9)).astype(single)
    most = np.abs(x).max(-1)
    for _ in range(boundaries):
        block, at = rng.integers(BLOCKS), rng.integers(WIDTH)
        if np.abs(x[block, at]) < most[block]:
            value = single((rng.integers(-126, 126) + 0.5) / 127 * float(most[block]))
            x[block, at] = value + rng.integers(-2, 3) * np.spacing(value)
    return x.reshape(1, -1)


def in_every_order(codes: Codes, w: Matrix) -> Iterator[np.float32]:
    """The sums of real kernels: blocks in any order, one lane or two, fused or not, offsets apart or with the rest."""
    q, d = codes.codes.reshape(BLOCKS, WIDTH), codes.scales[0]
    sums = codes.sums(BLOCKS)[0].astype(single)
    for order in permutations(range(BLOCKS)):
        for lanes, fused, apart in combinations((1, 2), (False, True), (False, True)):
            total = np.zeros(lanes, single)
            rest = single(0)
            for block in order:
                scale = single(single(d[block]) * w.scales[block])
                for lane, part in enumerate(np.split(np.arange(WIDTH), lanes)):
                    integer = int((q[block, part] * w.codes[block, part]).sum())
                    if fused:
                        total[lane] = single(float(scale) * integer + float(total[lane]))
                    else:
                        total[lane] = total[lane] + scale * single(integer)
                if w.offsets is not None:
                    if apart:
                        rest = rest + sums[block] * w.offsets[block]
                    else:
                        total[0] = total[0] + sums[block] * w.offsets[block]
            yield np.add.reduce(total, dtype=single) + rest


def enclosed(x: Enclosure, w: Matrix, how: InputFormat) -> Enclosure:
    groups = 0 if w.offsets is None else BLOCKS
    left = left_factor(x, how, groups)
    contested = contested_rows(left)
    return with_choices(coded_product(left, w.factors(), how.depth(WIDTH * BLOCKS)), left, contested)


def results(x: Enclosure) -> list[tuple[float, float]]:
    """The midpoint and the radius of each choice of codes, for one row and one output."""
    each = [mids for _, _, mids in candidates(x)]
    if not each:
        return [(float(x.mid[0, 0]), float(x.radius[0, 0]))]
    assert x.choices is not None
    return [(float(mid[0]), float(x.choices.radius[0, 0])) for mid in each[0]]


def every_choice(codes: Codes) -> list[Codes]:
    contested = np.flatnonzero(codes.contestable()[0])
    return [codes, *codes.alternatives(0, contested)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), name=st.sampled_from([*SMALL]), offsets=st.booleans(), boundaries=st.integers(0, 4)
)  # fmt: skip
def test_every_order_and_every_choice_of_codes_is_inside(seed: int, name: str, offsets: bool, boundaries: int) -> None:
    """Each choice has an interval of its own, and all are within the radius that a reader without a choice takes."""
    rng, how = np.random.default_rng(seed), SMALL[name]
    w, x = matrix(rng, offsets), inputs(rng, boundaries)
    found, codes = enclosed(Enclosure(x), w, how), quantise(x, how)
    intervals = results(found)
    low, high = found.mid[0, 0] - found.r[0, 0], found.mid[0, 0] + found.r[0, 0]
    for choice in every_choice(codes):
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(choice.values[0], w.factors().terms[0], strict=True))
        if w.offsets is not None:
            exact += sum(
                Fraction(float(a)) * Fraction(float(b)) for a, b in zip(choice.sums(BLOCKS)[0], w.offsets, strict=True)
            )
        mid, radius = min(intervals, key=lambda pair: abs(Fraction(pair[0]) - exact))
        for y in in_every_order(choice, w):
            assert abs(Fraction(float(y)) - Fraction(mid)) <= Fraction(radius)
            assert low <= y <= high


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from([*SMALL]), offsets=st.booleans(), wide=st.booleans())
def test_every_input_within_its_radius_is_inside(seed: int, name: str, offsets: bool, wide: bool) -> None:
    """The codes of a row that is not known: those of any row near it."""
    rng, how = np.random.default_rng(seed), SMALL[name]
    w, x = matrix(rng, offsets), inputs(rng, 1)
    radius = np.abs(x) * (0.25 if wide else 2.0**-12)
    found = enclosed(Enclosure(x, radius, radius**2), w, how)
    for _ in range(20):
        end = x + radius * rng.choice([-1, 1, rng.uniform(-1, 1)], x.shape)
        near = np.where(np.abs(end.astype(single) - x.astype(np.float64)) <= radius, end.astype(single), x)
        for y in in_every_order(quantise(near, how), w):
            assert abs(y - found.mid[0, 0]) <= found.r[0, 0]


@pytest.mark.parametrize("name", ["q8_0", "q8_1"])
def test_more_boundaries_than_are_tried_count_as_a_step_each(name: str) -> None:
    """Eight codes of a row lie between two integers exactly: either way is inside, and so is every mixture."""
    rng, how = np.random.default_rng(3), SMALL[name]
    x = (rng.integers(-126, 126, (BLOCKS, WIDTH)) + 0.5).astype(single)
    x[:, 0] = 127
    x, w = x.reshape(1, -1), matrix(rng, offsets=True)
    found, codes = enclosed(Enclosure(x), w, how), quantise(x, how)
    assert found.choices is None
    for choice in every_choice(codes):
        for y in in_every_order(choice, w):
            assert abs(y - found.mid[0, 0]) <= found.r[0, 0]


def test_a_code_that_is_sure_has_no_room_beside_many_that_are_not() -> None:
    """The matrix has zeros where the codes lie at a boundary, so that nothing is left open."""
    rng, how = np.random.default_rng(7), SMALL["q8_0"]
    x = np.array([[127, 3.5, 4.5, -7.5, 127, 9.5, 1.5, 2, 127, 3.5, 8.5, -5]], single)
    w = matrix(rng, offsets=False)
    codes = quantise(x, how)
    w = replace(w, codes=np.where(codes.contestable().reshape(BLOCKS, WIDTH), 0, np.abs(w.codes) + 1))
    found = enclosed(Enclosure(x), w, how)
    assert codes.contestable().sum() > FREE_CODES
    for y in in_every_order(codes, w):
        assert abs(y - found.mid[0, 0]) <= found.r[0, 0]
    for y in in_every_order(codes.replaced(0, [7], [3]), w):
        assert abs(y - found.mid[0, 0]) > found.r[0, 0]


def test_a_wrong_code_is_outside_and_a_contestable_one_is_a_choice() -> None:
    """The radius does not grow with a contestable code, as half a step would make it do."""
    rng, how = np.random.default_rng(5), SMALL["q8_0"]
    w, x = matrix(rng, offsets=False), np.array([[127, 3.25, 4.5, -7, 127, 9, 1, 2, 127, 3, 8, -5]], single)
    found, codes = enclosed(Enclosure(x), w, how), quantise(x, how)
    assert [np.argwhere(codes.contestable()).tolist(), len(results(found))] == [[[0, 2]], 2]
    wrong = codes.replaced(0, [5], [10])
    for y in in_every_order(wrong, w):
        assert all(abs(y - mid) > radius for mid, radius in results(found))


def test_scales_beyond_their_dtype_leave_no_bound() -> None:
    x = np.full((1, WIDTH * BLOCKS), 1e9, single)
    found = enclosed(Enclosure(x), matrix(np.random.default_rng(1), offsets=False), SMALL["q8_0"])
    assert np.isinf(found.r).all()


@pytest.mark.parametrize("n", [256, 4096, 14336])
def test_known_codes_are_narrower_than_float16_by_the_depth_of_the_sum(n: int) -> None:
    """Each term of a float16 product errs by 2^-11 of itself, and here by `depth` times 2^-24."""
    rng = np.random.default_rng(n)
    x, how = nearest(rng.standard_normal((8, n)), FLOAT32), input_formats()["q8_0"]
    codes, scales = rng.integers(-7, 8, (64, n // 32, 32)), nearest(rng.random((64, n // 32, 1)), FLOAT16)
    weights = Factors(terms=(codes * scales).reshape(64, n))
    known = coded_product(left_factor(Enclosure(x), how, 0), weights, how.depth(n)).r[:8]
    unknown = coded_product(left_factor(Enclosure(x, np.zeros(x.shape)), how, 0), weights, how.depth(n)).r
    rounded = 2.0**-11 * np.abs(x) @ np.abs(weights.terms).T
    assert np.median(rounded / known) > 0.99 * 2**13 / how.depth(n)
    assert np.median(unknown / known) > 20 * 2**13 / how.depth(n)


# ---- values that are kept in codes


def near_boundaries(rng: np.random.Generator, how: InputFormat) -> Any:
    """A row [1, n] of which some values lie within a few float32 values of a boundary between codes."""
    x = (rng.standard_normal((1, WIDTH * BLOCKS)) * 2.0 ** rng.integers(-9, 9)).astype(single)
    codes = quantise(x, how)
    for at in rng.integers(0, x.size, 4):
        step = codes.how.limits.spacing(codes.codes[0, at])
        value = single((codes.codes[0, at] + step * rng.choice([-0.5, 0.5])) * codes.scales[0, at // codes.width])
        if np.abs(value) < np.abs(x).max() / 2:
            x[0, at] = value + rng.integers(-2, 3) * np.spacing(value)
    return x


def inside(found: Enclosure, values: Any) -> bool:
    return bool((np.abs(values - found.mid) <= found.r).all())


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from([*KEPT]))
def test_every_choice_of_a_code_that_is_kept_is_inside_and_no_other(seed: int, name: str) -> None:
    """A code that is not contestable has no room at all: its neighbours are outside."""
    rng, how = np.random.default_rng(seed), KEPT[name]
    x = near_boundaries(rng, how)
    found, codes = in_codes(Enclosure(x), how), quantise(x, how)
    for choice in every_choice(codes):
        assert inside(found, choice.values)
    sure = ~codes.contestable()
    assert (found.r[sure] == 0).all()
    np.testing.assert_array_equal(found.mid[sure], codes.values[sure])
    assert sure.sum() >= x.size / 2


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from([*KEPT]), wide=st.booleans())
def test_codes_of_every_value_within_its_radius_are_inside(seed: int, name: str, wide: bool) -> None:
    rng, how = np.random.default_rng(seed), KEPT[name]
    x = near_boundaries(rng, how)
    radius = np.abs(x) * (0.25 if wide else 2.0**-12)
    found = in_codes(Enclosure(x, radius, radius**2), how)
    for _ in range(20):
        end = x + radius * rng.choice([-1, 1, rng.uniform(-1, 1)], x.shape)
        near = np.where(np.abs(end.astype(single) - x.astype(np.float64)) <= radius, end.astype(single), x)
        assert inside(found, quantise(near, how).values)


@pytest.mark.parametrize("name", KEPT)
def test_codes_of_a_pair_turned_by_any_angle_are_inside(name: str) -> None:
    """Where the angle of a pair is not known, the radius bounds the length of the error of both elements."""
    rng, how = np.random.default_rng(11), KEPT[name]
    half = WIDTH * BLOCKS // 2
    x = rng.standard_normal((1, 2 * half)).astype(single)
    length = np.tile(np.hypot(x[:, :half], x[:, half:]), 2)
    found = in_codes(Enclosure(x, np.zeros(x.shape), length=length), how)
    assert found.length is not None
    for angle in rng.uniform(0, 2 * np.pi, 100):
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = x[:, :half], x[:, half:]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1).astype(single)
        error = quantise(turned, how).values - turned.astype(np.float64)
        assert (np.hypot(error[:, :half], error[:, half:]) <= found.r[:, :half]).all()


def test_scales_beyond_their_dtype_are_kept_without_a_bound() -> None:
    assert np.isinf(in_codes(Enclosure(np.full((1, WIDTH), 1e9, single)), KEPT["q8_0"]).r).all()
