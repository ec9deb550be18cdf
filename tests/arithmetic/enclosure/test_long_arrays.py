# SPDX-License-Identifier: Apache-2.0
"""Long arrays go in pieces, and rows of several arrays go to their places. The results are those of whole arrays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.codes import Contest
from refmoe.arithmetic.enclosure.array import Choices, Enclosure, Partial, concatenate, joined
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps

RNG = np.random.default_rng(1)


def enclosure(*shape: int, **more: Any) -> Enclosure:
    return Enclosure(RNG.standard_normal(shape), RNG.random(shape), RNG.random(shape), **more)


def assert_same(one: Enclosure, other: Enclosure) -> None:
    assert (one.owed, one.accumulation, one.biased) == (other.owed, other.accumulation, other.biased)
    assert one.defers == other.defers
    for name in ("mid", "radius", "least_variance", "variance", "length", "bias"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_pieces_of_a_long_array_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, mask = enclosure(3, 40, 50), enclosure(3, 40, 50, owed=True), RNG.random((1, 40, 50)) < 0.7
    ops = EnclosureOps(policy(name))
    whole = x * y, ops.silu(y), ops.softmax(x, mask)
    for room in ("refmoe.arithmetic.enclosure.array", "refmoe.steps.enclosure_ops"):
        monkeypatch.setattr(f"{room}.PIECE", 700)
    for one, other in zip(whole, (x * y, ops.silu(y), ops.softmax(x, mask)), strict=True):
        assert_same(one, other)


def parts() -> list[Enclosure]:
    """Rows of several kinds."""
    return [
        enclosure(3, 5),
        Enclosure(RNG.standard_normal((1, 5))),
        Enclosure(RNG.random((1, 5)), RNG.random((1, 5)), Partial(RNG.random((1, 5)), lambda: np.full((1, 5), 2.0))),
        enclosure(2, 5, bias=RNG.random((2, 5))),
    ]


def test_rows_of_several_arrays_go_to_their_places() -> None:
    order, some = np.array([4, 0, 6, 2, 1, 5, 3]), parts()
    back = np.argsort(order)
    assert_same(concatenate(some, axis=0, order=order), concatenate(some, axis=0)[back])


@pytest.mark.parametrize("first", range(4))
def test_parts_that_come_one_by_one_are_joined_as_all_at_once_are(first: int) -> None:
    """Whatever the first one has or lacks."""
    some = parts()
    some = some[first:] + some[:first]
    ends = np.cumsum([0, *(len(part.mid) for part in some)])
    places = [(slice(start, stop),) for start, stop in pairwise(ends)]
    assert_same(joined(iter(some), places, 7, 5), concatenate(some, axis=0))


def test_choices_go_with_their_rows() -> None:
    order = np.array([2, 0, 1])
    contest = Contest(format="int8", ideal=(0.5,), columns=(0,), choices=((0,), (1,)))
    choices = Choices(
        row=np.array([[0, 0], [-1, -1]]), mids=(np.ones((2, 2)),), radius=np.ones((2, 2)), contests={0: contest}
    )
    both = concatenate([enclosure(2, 2, choices=choices), enclosure(1, 2)], axis=0, order=order)
    assert both.choices is not None
    assert both.choices.row.tolist() == [[-1, -1], [-1, -1], [0, 0]]
    assert both.choices.mids[0][2].tolist() == [1.0, 1.0]
    assert both.choices.contests == {0: contest}
