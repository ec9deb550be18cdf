# SPDX-License-Identifier: Apache-2.0
"""SAMPLE-1 to SAMPLE-8 against values by hand, exact arithmetic and the counts of many draws."""

from fractions import Fraction
from math import inf, log, nan, sqrt

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.errors import InputError
from refmoe.text.sampling import (
    SamplingSettings,
    apply_temperature,
    draw,
    greedy,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sample,
)


class Fixed:
    """A generator that returns given uniform numbers and counts them."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def pcg64(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def kept(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(logits > -inf).tolist())


JUST_BELOW_1 = 1 - 2**-53


def test_greedy_takes_the_largest_and_the_lower_id_on_ties():
    """SAMPLE-2"""
    assert greedy(vector(1, 3, 2)) == 1
    assert greedy(vector(1, 3, 3, -inf)) == 1
    assert greedy(vector(-inf, -5)) == 1
    assert sample(vector(0, 7, 7), SamplingSettings(), Fixed()) == 1  # takes no number from the generator


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones():
    """SAMPLE-3, bug samp-penalty-negative-logit: dividing -2 by 2 would raise it to -1."""
    logits = vector(4, -2, 0, 3, -inf)
    np.testing.assert_array_equal(penalise_repetition(logits, [0, 1, 1, 0, 2, 4], 2.0), vector(2, -4, 0, 3, -inf))
    np.testing.assert_array_equal(penalise_repetition(logits, [1], 0.5), vector(4, -1, 0, 3, -inf))
    np.testing.assert_array_equal(penalise_repetition(logits, [], 2.0), logits)
    assert sample(vector(-2, -3), SamplingSettings(repetition_penalty=2.0), Fixed(), seen=[0]) == 1


def test_a_penalty_cannot_make_a_logit_infinite():
    assert penalise_repetition(vector(1e300, 0), [0], 1e-300)[0] == np.finfo(np.float64).max
    assert sample(vector(0, 1e300), SamplingSettings(1.0, repetition_penalty=1e-300), Fixed(0.5), seen=[1]) == 1


def test_a_seen_token_outside_the_vocabulary_is_refused():
    for seen in ([3], [-1, 0]):
        with pytest.raises(InputError, match=r"token (3|-1) was seen, but 0 to 2 was expected"):
            sample(vector(1, 2, 3), SamplingSettings(), Fixed(), seen)


def test_temperature_divides_the_logits():
    """SAMPLE-4: equal up to one constant, so the differences are compared; exact for these numbers."""
    np.testing.assert_array_equal(np.diff(apply_temperature(vector(1, 3, -2), 2.0)), vector(1, -2.5))
    np.testing.assert_array_equal(apply_temperature(vector(1e308, -1e308, -inf), 1e-308), vector(0, -inf, -inf))


def test_a_low_temperature_approaches_greedy_and_a_high_one_the_uniform():
    """SAMPLE-4, by the definition p = exp(z/t) / sum: at z = (0, ln 3) and t = 1/2, p = (1, 9) / 10."""
    logits = vector(0, log(3))
    for t, first in ((1.0, 1 / 4), (0.5, 1 / 10), (2.0, 1 / (1 + sqrt(3)))):
        settings = SamplingSettings(temperature=t)
        assert sample(logits, settings, Fixed(first - 1e-9)) == 0
        assert sample(logits, settings, Fixed(first + 1e-9)) == 1
    assert sample(vector(0, 1e-3), SamplingSettings(temperature=1e-300), Fixed(0.0)) == 1
    assert sample(vector(0, 50), SamplingSettings(temperature=1e300), Fixed(0.49)) == 0


def test_top_k_keeps_exactly_k_and_the_lower_id_on_ties():
    """SAMPLE-5"""
    logits = vector(1, 3, 2, 3, 2, 2)
    assert [kept(keep_top_k(logits, k)) for k in (1, 2, 3, 4)] == [{1}, {1, 3}, {1, 2, 3}, {1, 2, 3, 4}]
    np.testing.assert_array_equal(keep_top_k(logits, 2), vector(-inf, 3, -inf, 3, -inf, -inf))
    np.testing.assert_array_equal(keep_top_k(logits, 6), logits)
    np.testing.assert_array_equal(keep_top_k(logits, 99), logits)
    assert kept(keep_top_k(vector(-inf, 1, -inf), 2)) == {1}


def test_top_p_keeps_the_token_that_crosses_p():
    """SAMPLE-6, bug samp-topp-excludes-crossing: of .4 .3 .2 .1, p = .8 keeps three, in any order of ids."""
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        probabilities = vector(0.4, 0.3, 0.2, 0.1)
        logits = np.empty(4)
        logits[order] = np.log(probabilities)
        for p, count in ((1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.8, 3), (0.89, 3), (0.91, 4)):
            assert kept(keep_top_p(logits, p)) == set(order[:count]), (p, order)


def test_top_p_at_one_and_at_a_cumulative_value():
    """SAMPLE-6, bug samp-topp-one-greedy. Four equal tokens: every sum is exact in binary64, ties by id."""
    equal = vector(5, 5, 5, 5)
    assert [kept(keep_top_p(equal, p)) for p in (0.25, 0.5, 0.75, 1.0)] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]
    assert [len(kept(keep_top_p(equal, np.nextafter(p, 1)))) for p in (0.25, 0.5, 0.75)] == [2, 3, 4]
    tail = vector(0, -700, -800)  # the sum of the first two already rounds to 1
    np.testing.assert_array_equal(keep_top_p(tail, 1.0), tail)
    assert sample(equal, SamplingSettings(temperature=1.0), Fixed(0.8)) == 3


@given(
    logits=st.lists(st.sampled_from([-inf, -2.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=7).filter(
        lambda values: max(values) > -inf
    ),
    p=st.integers(1, 63).map(lambda n: n / 64),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits, p):
    """SAMPLE-6 by brute force: no smaller set reaches p, and this one does. Rationals, of the rounded exponentials."""
    weights = [Fraction(float(np.exp(value - max(logits)))) for value in logits]
    total = sum(weights)
    nucleus = kept(keep_top_p(vector(*logits), p))
    mass = sum(weights[token] for token in nucleus) / total
    smaller = sum(sorted(weights, reverse=True)[: len(nucleus) - 1]) / total
    rounding = Fraction(2) ** -49  # seven additions of numbers below eight
    assert mass >= Fraction(p) - rounding
    assert smaller < Fraction(p) + rounding
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    assert nucleus == set(ranked[: len(nucleus)]) & kept(vector(*logits))


def test_top_p_counts_what_top_k_left():
    """SAMPLE-1, SAMPLE-6: of .4 .3 .2 .1, top-k 2 leaves 4/7 and 3/7, so p = .55 keeps one; alone it keeps two."""
    logits = np.log(vector(0.4, 0.3, 0.2, 0.1))
    both = SamplingSettings(temperature=1.0, top_k=2, top_p=0.55)
    assert sample(logits, both, Fixed(JUST_BELOW_1)) == 0
    assert sample(logits, SamplingSettings(temperature=1.0, top_p=0.55), Fixed(JUST_BELOW_1)) == 1


def test_the_order_is_penalty_temperature_top_k_top_p():
    """SAMPLE-1: token 0 leads only before the penalty; the nucleus is one token only after the temperature."""
    settings = SamplingSettings(temperature=0.1, top_k=2, top_p=0.9, repetition_penalty=4.0)
    assert sample(vector(4, 2, 1.5), settings, Fixed(JUST_BELOW_1), seen=[0]) == 1
    warm = SamplingSettings(temperature=1.0, top_k=2, top_p=0.9, repetition_penalty=4.0)
    assert sample(vector(4, 2, 1.5), warm, Fixed(JUST_BELOW_1), seen=[0]) == 2


def test_a_draw_inverts_the_cumulative_distribution_by_id():
    """SAMPLE-7: weights 1 1 0 1 1 give the exact boundaries 1/4 2/4 2/4 3/4; u on a boundary takes the next token."""
    logits = vector(0, 0, -inf, 0, 0)
    expected = {0.0: 0, 0.2499: 0, 0.25: 1, 0.4999: 1, 0.5: 3, 0.7499: 3, 0.75: 4, JUST_BELOW_1: 4}
    assert {u: draw(logits, u) for u in expected} == expected


@given(logits=st.lists(st.one_of(st.just(-inf), st.floats(-1e3, 1e3)), min_size=1).filter(lambda v: max(v) > -inf))
def test_an_excluded_token_is_never_drawn(logits):
    """SAMPLE-7, at both ends of the uniform's range."""
    for u in (0.0, 0.5, JUST_BELOW_1):
        assert logits[draw(vector(*logits), u)] > -inf


def test_the_counts_of_many_draws_fit_the_distribution():
    """SAMPLE-7. Each count is binomial: by Hoeffding, P(|count/n - p| >= t) <= 2 exp(-2 n t^2), here below 1e-17."""
    n, probabilities = 20_000, vector(0.5, 0.25, 0.125, 0.125)
    settings, rng = SamplingSettings(temperature=1.0), pcg64(7)
    counts = np.bincount([sample(np.log(probabilities), settings, rng) for _ in range(n)], minlength=4)
    bound = sqrt(log(2e17) / (2 * n))
    assert bound < 0.032
    assert np.all(np.abs(counts / n - probabilities) < bound)


def test_a_seed_fixes_the_draws():
    """SAMPLE-7: of 1000 equal tokens, floor(1000 u). NumPy's manual prints .77395605 .43887844 .85859792 .69736803 …
    as the first numbers of `default_rng(seed=42).random(10)`, whose generator is PCG64."""
    rng, settings = pcg64(42), SamplingSettings(temperature=1.0)
    assert [sample(np.zeros(1000), settings, rng) for _ in range(6)] == [773, 438, 858, 697, 94, 975]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_logits_of_any_floating_type_are_left_as_they_are(dtype):
    logits = np.array([1, 4, 2, -np.inf]).astype(dtype)
    before = logits.copy()
    settings = SamplingSettings(temperature=0.5, top_k=2, top_p=0.5, repetition_penalty=1.5)
    assert sample(logits, settings, Fixed(0.0), seen=[0, 1]) == 1
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    ("logits", "sentence"),
    [
        (vector(0, nan), "the logit of token 1 is nan, but a finite number or -inf was expected"),
        (vector(inf, 0), "the logit of token 0 is inf"),
        (vector(-inf, -inf), "all -inf"),
        (vector(), r"shape \[0\]"),
        (np.zeros((1, 3)), r"shape \[1, 3\], but one number for each token"),
        (np.float64(1), r"shape \[\]"),
        (np.array([1, 2]), "of type int64, but a floating-point type was expected"),
        (np.array([1j]), "of type complex128"),
        (np.array(["1"]), "of type <U1"),
    ],
)
def test_logits_that_no_choice_can_be_made_from_are_refused(logits, sentence):
    """SAMPLE-8, for greedy and for random sampling."""
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match=sentence):
            sample(logits, SamplingSettings(temperature=temperature), Fixed(0.5))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, nan, inf, "1", None, True, 10**400]),
        ("top_k", [0, -1, 1.0, True, "5"]),
        ("top_p", [0.0, -0.1, 1.0001, nan, None, False, "0.9"]),
        ("repetition_penalty", [0.0, -1.0, nan, inf, None, True]),
    ],
)
def test_a_setting_outside_its_range_is_refused(field, values):
    for value in values:
        with pytest.raises(InputError) as error:
            SamplingSettings(**{field: value})
        assert str(error.value).startswith(f"{field} is {value!r}, but a ")
        assert str(error.value).endswith(" was expected")


def test_settings_at_the_edge_of_their_range_are_accepted():
    SamplingSettings(temperature=0, top_k=1, top_p=1, repetition_penalty=1e-300)
    SamplingSettings(temperature=1e308, top_k=10**9, top_p=5e-324, repetition_penalty=1e308)
    assert sample(vector(0, 1), SamplingSettings(temperature=1.0, top_p=5e-324), Fixed(0.0)) == 1
