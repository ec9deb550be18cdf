# SPDX-License-Identifier: Apache-2.0
"""Long arrays go in pieces, and rows of several arrays go to their places. The results are those of whole arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.codes import Contest
from refmoe.arithmetic.enclosure.array import Choices, Enclosure, Partial, concatenate
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


def test_rows_of_several_arrays_go_to_their_places() -> None:
    order = np.array([4, 0, 6, 2, 1, 5, 3])
    parts = [
        enclosure(3, 5),
        Enclosure(RNG.standard_normal((1, 5))),
        Enclosure(RNG.random((1, 5)), RNG.random((1, 5)), Partial(RNG.random((1, 5)), lambda: np.full((1, 5), 2.0))),
        enclosure(2, 5, bias=RNG.random((2, 5))),
    ]
    back = np.argsort(order)
    assert_same(concatenate(parts, axis=0, order=order), concatenate(parts, axis=0)[back])


def test_choices_go_with_their_rows() -> None:
    order = np.array([2, 0, 1])
    contest = Contest(format="int8", ideal=(0.5,), columns=(0,), choices=((0,), (1,)))
    choices = Choices(
        row=np.array([[0, 0], [-1, -1]]), mids=(np.ones((2, 2)),), radius=np.ones((2, 2)), contests={0: contest}
    )
    joined = concatenate([enclosure(2, 2, choices=choices), enclosure(1, 2)], axis=0, order=order)
    assert joined.choices is not None
    assert joined.choices.row.tolist() == [[-1, -1], [-1, -1], [0, 0]]
    assert joined.choices.mids[0][2].tolist() == [1.0, 1.0]
    assert joined.choices.contests == {0: contest}
