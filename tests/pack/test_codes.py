# SPDX-License-Identifier: Apache-2.0
"""A radius in a byte is never smaller than it was, and at most an eighth of a power of two larger."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refmoe.suite.pack.codes import LARGEST, LOWEST_BASE, MANTISSAS, NOT_JUDGED, decode, encode, table

RADII = st.lists(st.floats(2.0**-140, 2.0**90) | st.just(0.0) | st.just(float("nan")), min_size=1, max_size=40)


def test_mantissas_are_roots_of_two() -> None:
    """Correctly rounded: the eighth power of half a spacing below is less than 2^i, and that of half above is more."""
    for i, mantissa in enumerate(MANTISSAS):
        half = Fraction(float(np.spacing(mantissa))) / 2
        assert (Fraction(mantissa) - half) ** 8 <= 2**i <= (Fraction(mantissa) + half) ** 8


@given(RADII)
def test_codes_round_up_by_nine_per_cent_at_most(radii: list[float]) -> None:
    radius = np.array(radii)
    base, codes = encode(radius)
    again = decode(base, codes)
    judged = ~np.isnan(radius)
    assert np.array_equal(codes == NOT_JUDGED, ~judged)
    assert (again[judged] >= radius[judged]).all()
    least = np.ldexp(1.0, base)  # smaller ones become this one
    assert (again[judged] <= np.maximum(radius[judged] * MANTISSAS[1] * (1 + 2**-40), least)).all()
    assert (again[radius == 0] == 0).all()
    if (radius[judged] > 0).any():
        assert base == LOWEST_BASE or least <= radius[judged].max() * 2.0**-29


def test_each_code_stands_for_itself() -> None:
    for base in (-200, -31, 0, 12):
        radii = table(base)
        assert len(radii) == LARGEST
        assert (np.diff(radii) > 0).all()
        found, codes = encode(radii[-20:])
        assert np.array_equal(decode(found, codes), radii[-20:])
