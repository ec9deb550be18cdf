# SPDX-License-Identifier: Apache-2.0
"""The rule by which a change explains errors, on values made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.arithmetic.formats import FLOAT32
from refmoe.verifier.diagnosis.fit import (
    LEFT,
    NOTHING,
    SIZE,
    by_size,
    by_value,
    carriers_of,
    contradicted,
    explains_from_afar,
    within_own_rounding,
)
from refmoe.verifier.diagnosis.observed import Observed, Recorded

KEY = ("prefill", "layers.0.attention.v")
N = 400
SIGMA = 1e-6


def noise(seed: int, size: float = 1.0) -> Any:
    return np.random.default_rng(seed).standard_normal(N) * size


def tap(found: Any, passes: bool = False) -> dict[Any, Observed]:
    """Values beside a specification that says 1 everywhere, with errors of about SIGMA."""
    return {
        KEY: Observed(
            found=found,
            mid=np.ones(N),
            variance=np.full(N, SIGMA**2),
            format=FLOAT32,
            read=np.ones(N, bool),
            wrong=~(np.abs(found - 1) <= 20 * SIGMA),
            passes=passes,
            as_stored=True,
        )
    }


def recorded(mid: Any, sigma: float) -> dict[Any, Recorded]:
    """A changed specification with errors of about sigma."""
    mid = np.broadcast_to(mid, N)
    everywhere = np.full(N, sigma**2)
    return {KEY: Recorded(mid, everywhere, everywhere, mid, np.ones(N, bool))}


EFFECT = noise(1, 1e-3)
"""The effect of a bug."""


def test_the_bug_itself_leaves_nothing_and_its_half_leaves_half() -> None:
    observed = tap(1 + EFFECT)
    whole, half = by_value(observed, [KEY], {KEY: 1 + EFFECT}), by_value(observed, [KEY], {KEY: 1 + EFFECT / 2})
    assert (whole.coefficient, whole.residual) == (pytest.approx(1), pytest.approx(0, abs=1e-4))
    assert (half.coefficient, half.residual) == (pytest.approx(2), pytest.approx(0.5, abs=1e-3))


def test_a_change_that_moves_no_value_explains_nothing() -> None:
    fit = by_value(tap(1 + EFFECT), [KEY], {KEY: np.ones(N)})
    assert fit.residual == pytest.approx(1)
    assert not fit.explains


@given(st.integers(0, 1000), st.floats(0.5, 2))
def test_an_unrelated_effect_of_any_size_explains_nothing(seed: int, size: float) -> None:
    other = np.random.default_rng([7, seed]).standard_normal(N) * 1e-3 * size
    assert not by_value(tap(1 + EFFECT), [KEY], {KEY: 1 + other}).explains


def test_values_that_are_not_finite_must_be_predicted_in_their_places() -> None:
    gap = np.where(np.arange(N) == 3, np.nan, 1 + EFFECT)
    assert by_value(tap(gap), [KEY], {KEY: gap}).explains
    assert by_value(tap(gap), [KEY], {KEY: 1 + EFFECT}) == NOTHING
    assert by_value(tap(1 + EFFECT), [KEY], {KEY: gap}) == NOTHING
    assert by_value(tap(1 + EFFECT), [KEY], {KEY: np.ones(N - 1)}) == NOTHING


def test_the_rounding_errors_beside_gaps_need_no_explanation() -> None:
    """A failed check whose finite values are all right fails by its gaps."""
    gap = np.where(np.arange(N) < 30, np.nan, 1 + noise(2, SIGMA))
    fit = by_value(tap(gap), [KEY], {KEY: np.where(np.isnan(gap), np.nan, 1.0)})
    assert (fit.residual, fit.carriers) == (0, 30)


def test_a_check_that_passes_refutes_a_change_with_an_effect_on_it() -> None:
    honest = tap(1 + noise(2, SIGMA), passes=True)
    assert contradicted(honest, {KEY: 1 + EFFECT}) == KEY
    assert contradicted(honest, {KEY: np.full(N, np.nan)}) == KEY


def test_an_effect_that_rounding_hides_refutes_nothing() -> None:
    honest = tap(1 + noise(2, SIGMA), passes=True)
    assert contradicted(honest, {KEY: 1 + noise(3, SIGMA)}) is None
    assert contradicted(tap(1 + EFFECT), {KEY: 1 + EFFECT}) is None
    assert contradicted(honest, {}) is None


@pytest.mark.parametrize(("size", "explains"), [(0.1, False), (0.3, True), (1.0, True), (1.2, True), (3.5, False)])
def test_errors_of_another_size_than_predicted_are_not_explained(size: float, explains: bool) -> None:
    """Too small as well as too large: a coarser arithmetic predicts errors, it does not only allow them."""
    assert by_size(tap(1 + noise(4, 1e-3 * size)), [KEY], recorded(1.0, 1e-3)).explains == explains


def test_one_large_value_among_right_ones_has_no_size() -> None:
    one = np.ones(N)
    one[7] += 1e-3 * math.sqrt(N)  # its root mean square is as predicted
    assert not by_size(tap(one), [KEY], recorded(1.0, 1e-3)).explains


def test_a_change_that_predicts_no_larger_errors_has_no_size() -> None:
    assert by_size(tap(1 + EFFECT), [KEY], recorded(1.0, SIGMA)) == NOTHING


def test_what_nothing_bounds_must_be_predicted_up_to_the_rounding_of_the_change() -> None:
    observed = tap(1 + EFFECT)
    for factor, within in ((SIZE / 2, True), (SIZE * 2, False)):
        left = noise(5, 1e-5)
        predicted = {KEY: 1 + EFFECT + left}
        ideal = {KEY: predicted[KEY] + noise(6, 1e-5 / factor)}
        assert within_own_rounding(observed, KEY, predicted, ideal) == within
    assert not within_own_rounding(observed, KEY, {KEY: np.ones(N)}, {KEY: np.ones(N) + noise(6, 1.0)})


def test_the_limit_is_half_of_the_mean_square() -> None:
    assert pytest.approx(0.5) == LEFT**2


@pytest.mark.parametrize(
    ("left", "made", "explains"),
    [(0.1, 0.0, True), (0.3, 0.2, True), (0.3, 0.1, False), (0.45, 0.3, True), (0.6, 0.6, False)],
)
def test_from_afar_little_is_left_or_what_its_own_rounding_makes(left: float, made: float, explains: bool) -> None:
    """left, made: sizes over that of the whole error"""
    observed = tap(1 + EFFECT)
    predicted = {KEY: 1 + (1 - left) * EFFECT}
    fit = by_value(observed, [KEY], predicted)
    assert fit.residual == pytest.approx(left, abs=1e-3)
    rounded = {KEY: predicted[KEY] + noise(9, 1e-3 * made)}
    assert explains_from_afar(fit, observed, [KEY], predicted, lambda: rounded) == explains


@pytest.mark.parametrize(("carriers", "explains"), [(1, False), (8, False), (16, True), (N, True)])
def test_from_afar_a_few_values_may_agree_by_accident(carriers: int, explains: bool) -> None:
    """A quarter is left in each case, as rounding makes it. An accident of that kind has probability 4^-carriers."""
    effect = np.where(np.arange(N) < carriers, 1e-3, 0.0)
    observed = tap(1 + effect)
    predicted = {KEY: 1 + 0.75 * effect}
    fit = by_value(observed, [KEY], predicted)
    assert fit.carriers == pytest.approx(carriers, rel=1e-6)
    assert explains_from_afar(fit, observed, [KEY], predicted, lambda: {KEY: 1 + 0.5 * effect}) == explains


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("left", [0.2, 0.5])
def test_an_effect_without_relation_to_the_error_leaves_little_as_rarely_as_stated(n: int, left: float) -> None:
    """Directions are uniform, sizes uniform in their logarithm over two decades."""
    rng = np.random.default_rng(n)
    draws = 200_000
    direction = rng.standard_normal((draws, n))
    effect = direction / np.linalg.norm(direction, axis=1, keepdims=True) * 10 ** rng.uniform(-1, 1, (draws, 1))
    error = np.ones(n) / math.sqrt(n)
    assert carriers_of([error]) == pytest.approx(n)
    within = (np.linalg.norm(effect - error, axis=1) <= left).mean()
    assert 0 < within <= left**n


def test_a_change_that_accounts_for_nothing_is_no_evidence() -> None:
    assert NOTHING.bits == -math.inf
    assert by_value(tap(1 + EFFECT), [KEY], {KEY: 1 + EFFECT}).bits > 1000


@given(st.lists(st.floats(0, 2.0**400), min_size=1, max_size=20))
def test_at_least_one_value_and_at_most_all_carry_an_error(sizes: list[float]) -> None:
    carriers = carriers_of([np.array(sizes)])
    assert carriers == 0 if not any(sizes) else 1 - 1e-9 <= carriers <= len(sizes) + 1e-9
