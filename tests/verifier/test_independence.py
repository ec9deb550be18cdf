# SPDX-License-Identifier: Apache-2.0
"""Errors of other weights are a linear function of the input. Noise is not, however large it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refmoe.verifier.diagnosis.independence import linear

TOKENS, INPUTS, OUTPUTS = 40, 24, 16
ONE = np.zeros(TOKENS, np.int64)
"""One matrix for all rows."""
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.floats(-30, 30).map(lambda power: 10.0**power)


def drawn(seed: int) -> tuple[Any, Any]:
    """Inputs [T, N] of different sizes, and a source of random numbers."""
    random = np.random.default_rng(seed)
    return random.standard_normal((TOKENS, INPUTS)) * random.uniform(0.1, 10, (TOKENS, 1)), random


@given(SEEDS, SIZES)
def test_errors_of_other_weights_are_linear_in_the_input(seed: int, size: float) -> None:
    inputs, random = drawn(seed)
    assert linear(inputs, size * inputs @ random.standard_normal((INPUTS, OUTPUTS)), ONE)


@given(SEEDS, SIZES)
def test_a_random_factor_of_each_input_is_noise(seed: int, size: float) -> None:
    inputs, random = drawn(seed)
    weights = random.standard_normal((INPUTS, OUTPUTS))
    assert not linear(inputs, size * (inputs * random.uniform(-1, 1, inputs.shape)) @ weights, ONE)


@given(SEEDS, SIZES)
def test_roundings_of_each_output_are_noise(seed: int, size: float) -> None:
    inputs, random = drawn(seed)
    assert not linear(inputs, size * random.standard_normal((TOKENS, OUTPUTS)), ONE)


@given(SEEDS)
def test_too_few_tokens_tell_nothing(seed: int) -> None:
    inputs, random = drawn(seed)
    assert not linear(inputs[:1], inputs[:1] @ random.standard_normal((INPUTS, OUTPUTS)), ONE[:1])
    assert not linear(np.zeros((TOKENS, INPUTS)), np.zeros((TOKENS, OUTPUTS)), ONE)


@given(SEEDS, SIZES)
def test_errors_of_the_weights_of_experts_are_linear_in_the_rows_of_each(seed: int, size: float) -> None:
    inputs, random = drawn(seed)
    expert = random.integers(0, 2, TOKENS)
    weights = random.standard_normal((2, INPUTS, OUTPUTS))
    errors = size * np.einsum("tn,tnm->tm", inputs, weights[expert])
    assert linear(inputs, errors, expert)
    assert not linear(inputs, errors, np.arange(TOKENS))
