# SPDX-License-Identifier: Apache-2.0
"""Turned rows: every order of the sums, every input within its radius, and the codes that are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.codes import quantise
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.coded import in_codes
from refmoe.arithmetic.enclosure.turned import turned
from refmoe.arithmetic.turning import factor, matrix, turn
from refmoe.profiles.inputs import input_formats

WIDTH = 4
single = np.float32
KEPT = {name: replace(input_formats()[name], block=WIDTH) for name in ("q8_0", "q4_0")}


def inputs(seed: int) -> Any:
    """A row [1, 4], sometimes with values that cancel each other, or that a float32 hardly holds."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((1, WIDTH)) * 2.0 ** rng.integers(-9, 9)).astype(single)
    if seed % 3 == 0:
        x[0, 1:3] = -x[0, :2] * single(1 + 2.0**-20)
    return x * single(2.0 ** (-145 if seed % 7 == 0 else 0))


def in_every_order(x: Any) -> Iterator[Any]:
    """The float32 results [4] of stages, of stages in the other order, and of products with every order of the sum."""
    yield turn(x, WIDTH, single)[0]
    swapped = turn(x[:, [0, 2, 1, 3]], WIDTH, single)[0]
    yield swapped[[0, 2, 1, 3]]
    for by in (single(0.5), np.nextafter(single(0.5), single(0))):  # an engine may compute its factor otherwise
        terms = x[0] * by * np.sign(matrix(WIDTH)).astype(single)
        for order in permutations(range(WIDTH)):
            a, b, c, d = (terms[:, i] for i in order)
            yield ((a + b) + c) + d
            yield (a + b) + (c + d)
    late = x[0] * np.sign(matrix(WIDTH)).astype(single)  # scaled last
    yield (((late[:, 0] + late[:, 1]) + late[:, 2]) + late[:, 3]) * single(factor(WIDTH))


def inside(found: Enclosure, values: Any) -> bool:
    return bool((np.abs(values - found.mid) <= found.r).all())


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_order_is_inside_and_stages_are_known(seed: int) -> None:
    x = inputs(seed)
    found = turned(Enclosure(x), WIDTH, staged=False)
    for values in in_every_order(x):
        assert inside(found, values.astype(float))
    staged = turned(Enclosure(x), WIDTH, staged=True)
    assert staged.radius is None
    np.testing.assert_array_equal(staged.mid, turn(x, WIDTH, single))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), staged=st.booleans())
def test_every_input_within_its_radius_is_inside(seed: int, staged: bool) -> None:
    rng, x = np.random.default_rng(seed), inputs(seed)
    radius = np.abs(x).astype(float) * 2.0 ** rng.integers(-20, 0)
    found = turned(Enclosure(x, radius, radius**2), WIDTH, staged)
    for _ in range(10):
        end = (x + radius * rng.choice([-1, 1, rng.uniform(-1, 1)], x.shape)).astype(single)
        near = np.where(np.abs(end - x.astype(float)) <= radius, end, x)
        for values in [turn(near, WIDTH, single)[0]] if staged else in_every_order(near):
            assert inside(found, values.astype(float))


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from([*KEPT]))
def test_codes_of_every_order_are_inside(seed: int, name: str) -> None:
    """Values at the boundary of two codes, which the rounding of a turn decides, included."""
    how, rng = KEPT[name], np.random.default_rng(seed)
    codes = rng.integers(-6, 7, (1, WIDTH)) + rng.choice([0.0, 0.5], (1, WIDTH))
    codes[0, 0] = how.most
    x = turn(codes * rng.uniform(0.5, 2), WIDTH, np.float64).astype(single)  # its turn is near a multiple of `codes`
    found = in_codes(turned(Enclosure(x), WIDTH, staged=False), how)
    for values in in_every_order(x):
        assert inside(found, quantise(values[None].astype(single), how).values)


def test_far_from_boundaries_the_codes_are_known_in_any_order() -> None:
    """Of random values nearly all are. Where the maximum is known to 40 roundings, a float16 scale seldom is not."""
    x = np.random.default_rng(5).standard_normal((64, 128)).astype(single)
    for name, least in (("q8_0", 0.95), ("q4_0", 0.95)):
        how = input_formats()[name]
        found = in_codes(turned(Enclosure(x), 64, staged=False), how)
        sure = found.r == 0
        assert sure.mean() > least, name
        expected = quantise(turn(x, 64, single), how).values
        np.testing.assert_array_equal(found.mid[sure], expected[sure])


@pytest.mark.parametrize("staged", [True, False])
def test_a_pair_turned_by_any_angle_is_inside(staged: bool) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, WIDTH)).astype(single)
    length = np.tile(np.hypot(x[:, :2], x[:, 2:]), 2)
    found = turned(Enclosure(x, np.zeros(x.shape), length=length), WIDTH, staged)
    for angle in rng.uniform(0, 2 * np.pi, 50):
        cos, sin = np.cos(angle), np.sin(angle)
        pairs = np.concatenate([x[:, :2] * cos - x[:, 2:] * sin, x[:, 2:] * cos + x[:, :2] * sin], axis=1)
        assert inside(found, turn(pairs.astype(single), WIDTH, single))
