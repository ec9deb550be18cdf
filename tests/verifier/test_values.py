# SPDX-License-Identifier: Apache-2.0
"""The figures of finite values, of which only suspects are computed whole, are those of all values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.enclosure.array import Enclosure, Partial
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, FLOAT32, Format, nearest
from refmoe.verifier.tally import PIECE, Calm, Limits, Tally
from refmoe.verifier.values import Values, judged, measured

CALM = 5.0
# as in a tally: what is divided by zero is not used
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NARROW = (FLOAT32, BFLOAT16, FLOAT16)


@st.composite
def values(draw: st.DrawFn) -> Values:
    """Values near and far from midpoints at and around powers of two, zero, and the smallest normal value."""
    format, n = draw(st.sampled_from(NARROW)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    powers = np.ldexp(1.0, rng.integers(-3, 3, n)) * draw(st.sampled_from((1.0, format.tiny, 2.0**10)))
    steps = rng.choice([0.0, 4.0, -4.0, 1.0, 3.0, 4 * rng.random()], n)  # 1 and 3 are ties
    mid = powers * rng.choice([-1, 1], n) * (1 + steps * format.u)
    mid[rng.random(n) < draw(st.sampled_from((0.0, 0.3)))] = 0.0
    radius = np.abs(mid) * rng.random(n) * draw(st.sampled_from((0.0, format.u / 16, format.u, 0.5)))
    variance = (radius / draw(st.sampled_from((1.0, 30.0)))) ** 2
    variance[rng.random(n) < draw(st.sampled_from((0.0, 0.3)))] = 0.0
    found = mid + radius * rng.standard_normal(n) * draw(st.sampled_from((0.0, 0.3, 1.0, 4.0)))
    found *= np.where(rng.random(n) < draw(st.sampled_from((0.0, 0.1))), -1.0, 1.0)
    return Values(found=nearest(found, format), mid=mid, radius=radius, variance=variance, format=format)


@given(values(), st.sampled_from((0.0, 0.5, 1.0, 3.0)), st.sampled_from((0.0, 2.0, 50.0)))
def test_no_value_that_is_no_suspect_is_outside_or_exceeds_the_figures_so_far(
    some: Values, ratio: float, excess: float
) -> None:
    found, whole = measured(some, ratio, excess), judged(some, may_overflow=False)
    assert found is not None
    rest = np.ones(some.found.size, bool)
    rest[found.suspects] = False
    suspects = judged(some.at(found.suspects), may_overflow=False)
    assert not whole.outside[rest].any()
    most_ratio, most_excess = (
        max(np.fmax.reduce(each, initial=0.0), 0.0) for each in (suspects.ratio, suspects.excess)
    )
    assert (np.nan_to_num(whole.ratio[rest]) <= max(ratio, most_ratio)).all()
    assert (whole.excess[rest] <= max(excess, most_excess)).all()


@given(values())
def test_the_sums_of_finite_values_are_those_of_all(some: Values) -> None:
    found, whole = measured(some, 0.0, 0.0), judged(some, may_overflow=False)
    assert found is not None
    for one, other in zip(found.sizes, whole.sizes, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("where", "strange"),
    [*((where, x) for where in ("found", "mid", "radius", "variance") for x in (np.nan, np.inf)), ("found", -np.inf)],
)
def test_a_value_that_is_not_finite_is_not_passed_over(where: str, strange: float) -> None:
    parts: dict[str, Any] = {
        "found": np.ones(4), "mid": np.ones(4), "radius": np.full(4, 0.1), "variance": np.full(4, 0.1)
    }  # fmt: skip
    parts[where][2] = strange
    assert measured(Values(**parts, format=FLOAT32), 0.0, 0.0) is None


@given(values(), st.sampled_from((0.0, 2.0, 50.0)))
def test_where_more_of_the_spread_may_count_all_values_are_computed_whole(some: Values, excess: float) -> None:
    some = some._replace(later=lambda: (some.variance, 0.0), calm=CALM)
    if measured(some, 0.0, excess) is not None:
        assert (judged(some, may_overflow=False).excess <= max(excess, CALM)).all()


@given(values(), st.floats(1, 100), st.floats(0, 10))
def test_far_values_have_their_distance_with_the_whole_spread(some: Values, more: float, shift: float) -> None:
    shifts = shift * np.sqrt(some.variance)
    asked = judged(some._replace(later=lambda: (more * some.variance, shifts), calm=CALM), may_overflow=False)
    known, whole = judged(some, may_overflow=False), judged(some._replace(variance=more * some.variance), False)
    far = known.excess > CALM
    np.testing.assert_array_equal(asked.excess[~far], known.excess[~far])
    np.testing.assert_array_equal(asked.sigma[far], whole.sigma[far])
    assert (asked.excess[far] <= whole.excess[far]).all()


def test_ties_of_exact_values_are_no_suspects() -> None:
    """An addition makes many of them: half a spacing from two values, and as far as a legal value can be."""
    mid = 1 + (2 * np.arange(100) + 1) * FLOAT32.u
    exact = Values(found=nearest(mid, FLOAT32), mid=mid, radius=0.0 * mid, variance=0.0 * mid, format=FLOAT32)
    first, later = measured(exact, 0.0, 0.0), measured(exact, 1.0, 0.0)
    assert first is not None
    assert later is not None
    assert first.suspects.tolist() == [0]
    assert later.suspects.size == 0
    wrong = exact._replace(found=exact.found + np.where(np.arange(100) == 7, 4 * FLOAT32.u, 0.0))
    found = measured(wrong, 1.0, 0.0)
    assert found is not None
    assert found.suspects.tolist() == [7]


@given(
    st.floats(1e-100, 1 - 1e-9), st.integers(1, 10**12), st.integers(1, 10**5), st.floats(1, 1e4),
    st.integers(1, 10**9),
)  # fmt: skip
def test_all_limits_are_above_what_is_calm(
    significance: float, values: int, tensors: int, alike: float, counted: int
) -> None:
    limits = Limits(significance, values, tensors)
    assert limits.calm.excess < limits.excess
    assert counted + limits.calm.squares * np.sqrt(counted) < counted * limits.rms(counted, alike) ** 2


def test_a_low_limit_accuses_nobody_by_a_part_of_the_spread() -> None:
    """Of few values, with a large significance, the limit is 2 standard deviations."""
    limits = Limits(0.9, 8, 1)
    tally = Tally(calm=limits.calm)
    x, y = deferring(np.array([3.0, *np.zeros(7)]), [], "whole")
    tally.add(x, y, FLOAT32, FLOAT32, lambda at: (at,), may_overflow=False)
    assert tally.excess < limits.excess < 3


def deferring(errors: Any, asked: list[int], what: str) -> tuple[Enclosure, Any]:
    """An enclosure with a bias of 8, or a variance of 64, and values with these errors.

    asked: gets an entry with each use of what is deferred
    """

    def more() -> Any:
        asked.append(1)
        return np.full(errors.size, {"bias": 8.0, "whole": 64.0}[what])

    mid = np.full(errors.size, 1000.0)
    spread = np.ones(errors.size)
    found = nearest(mid + errors, FLOAT32)
    if what == "bias":
        return Enclosure(mid, 100 * spread, spread, bias=more), found
    return Enclosure(mid, 100 * spread, Partial(spread, more)), found


@pytest.mark.parametrize("what", ["bias", "whole"])
@pytest.mark.parametrize(("size", "used"), [(1.0, False), (1.5, True)])
def test_what_is_deferred_is_computed_only_where_errors_are_too_large(size: float, used: bool, what: str) -> None:
    asked: list[int] = []
    errors = size * np.random.default_rng(1).standard_normal(3 * PIECE)
    tally = Tally(calm=Calm(CALM, 2.0))
    x, y = deferring(np.clip(errors, -4.5, 4.5), asked, what)
    tally.add(x, y, FLOAT32, FLOAT32, lambda at: (at,), may_overflow=False)
    assert bool(asked) == used
    # with the whole spread, errors are smaller than expected; what came before it is below any limit
    assert tally.rms**2 < 1 + 4 / np.sqrt(errors.size)


@pytest.mark.parametrize("what", ["bias", "whole"])
def test_a_value_that_is_far_without_what_is_deferred_is_near_with_it(what: str) -> None:
    asked: list[int] = []
    errors = np.random.default_rng(1).standard_normal(3 * PIECE) / 4
    errors[PIECE + 5] = 20.0
    tally = Tally(calm=Calm(CALM, 2.0))
    x, y = deferring(errors, asked, what)
    tally.add(x, y, FLOAT32, FLOAT32, lambda at: (at,), may_overflow=False)
    assert asked
    assert tally.excess == pytest.approx({"bias": 12.0, "whole": 2.5}[what], rel=1e-3)


@pytest.mark.parametrize("format", NARROW, ids=str)
def test_a_power_of_two_of_the_other_sign_is_a_suspect(format: Format) -> None:
    # the cell of a power of two is half as long towards zero, on which side the midpoint lies
    spacing = 0.125 * 2 * format.u
    found, mid = np.array([0.125]), np.array([-0.125])
    radius = np.array([0.25 - 3 / 8 * spacing])
    some = Values(found=found, mid=mid, radius=radius, variance=np.array([1.0]), format=format)
    result = measured(some, 10.0, 10.0)
    assert judged(some, may_overflow=False).outside.all()
    assert result is not None
    assert result.suspects.tolist() == [0]
