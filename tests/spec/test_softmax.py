# SPDX-License-Identifier: Apache-2.0
"""The softmax of attention and router: its values from mathematics, its largest element, its mask."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.spec.softmax import softmax


def float32() -> Any:
    return NativeOps(np.float32)


def float64() -> Any:
    return NativeOps(np.float64)


OPS = [ExactOps, float64, float32]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("shift", [-65536.0, -96.0, 96.0, 1024.0, 65536.0])
def test_a_shift_of_the_row_changes_no_bit(ops: Any, shift: float) -> None:
    """SOFTMAX-1: integers and their differences are exact, so what exp is given is the same; at 96 exp overflows in
    float32, and at 1024 in float64."""
    made = ops()
    row = np.array([[3.0, -2.0, 0.0, 3.0], [-7.0, -7.0, 1.0, -40.0]])
    before, after = (softmax(made, made.array(row + by)) for by in (0.0, shift))
    assert np.isfinite(after).all()
    assert np.array_equal(before, after)


@pytest.mark.parametrize("ops", OPS)
def test_the_largest_element_is_subtracted_and_not_another(ops: Any) -> None:
    """SOFTMAX-1: exp of a positive number is never asked for."""
    made = ops()
    asked: list[Any] = []
    plain = made.exp

    def watched(x: Any) -> Any:
        asked.append(x)
        return plain(x)

    made.exp = watched
    softmax(made, made.array(np.array([[-1e30, 5.0, 1e30], [2.0, 1.0, 0.0]])))
    softmax(made, made.array(np.array([[9.0, 5.0, 1.0]])), np.array([[False, True, True]]))
    assert len(asked) == 2
    assert all((np.asarray(x) <= 0).all() for x in asked)
    assert all((np.asarray(x).max(axis=-1) == 0).all() for x in asked)


@pytest.mark.parametrize(("ops", "unit"), [(ExactOps, 2.0**-53), (float64, 2.0**-53), (float32, 2.0**-24)])
def test_of_logarithms_of_integers_it_is_rational(ops: Any, unit: float) -> None:
    """SOFTMAX-1: of log n it is n over the sum of all. A log below 2 is off by at most one u, and so relatively is its
    exp; the difference, exp, the sum and the quotient round too: 8 u are enough for all of them."""
    made, integers = ops(), [1, 2, 3, 5]
    found = softmax(made, made.array(np.log(np.array([integers], np.float64))))
    for value, n in zip(found[0].tolist(), integers, strict=True):
        expected = Fraction(n, sum(integers))
        assert abs(Fraction(value) - expected) <= 8 * Fraction(unit) * expected


@pytest.mark.parametrize("ops", OPS)
def test_a_masked_element_is_zero_and_moves_no_other(ops: Any) -> None:
    """SOFTMAX-2: whatever stands there, the largest of all included, the others are those of the row without it."""
    made = ops()
    row, mask = np.array([[1.0, 0.5, -2.0, 4.0]]), np.array([[True, False, True, True]])
    alone = softmax(made, made.array(row[mask][None]))
    for there in (0.5, 100.0, -1e30, 1e30, float("inf"), float("-inf")):
        row[0, 1] = there
        found = softmax(made, made.array(row), mask)
        assert found[0, 1] == 0
        assert np.array_equal(found[mask], alone[0])
