# SPDX-License-Identifier: Apache-2.0
"""`sampler.json` against refmoe, stage by stage. The known bugs: `tests/bugs/test_outside.py`."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.arrays import Array
from refmoe.text import sampling
from refmoe.text.sampling import SamplingSettings
from tests.vectors.files import load
from tests.vectors.numbers import contains, read

Vector = dict[str, Any]
VECTORS = load("sampler.json")["vectors"]
DRAWN = [vector for vector in VECTORS if vector["temperature"] != "0"]

# Relative, of a probability: exp within 1 ulp of an argument rounded twice (its error times the logit's size, at most
# 2000 here), a sum of at most 8 and a division.
ROUNDING = Fraction(4096, 2**53)


def name_of(vector: Vector) -> str:
    return str(vector["name"])


def logits_of(vector: Vector) -> Array:
    return np.array([read(text) for text in vector["logits"]])


def settings_of(vector: Vector) -> SamplingSettings:
    return SamplingSettings(
        read(vector["temperature"]), vector["top_k"], read(vector["top_p"]), read(vector["repetition_penalty"])
    )


class Uniform:
    """A generator that returns a given number."""

    def __init__(self, u: str) -> None:
        self.u = read(u)

    def random(self) -> float:
        return self.u


def chosen(vector: Vector, u: str = "0") -> int:
    rng: Any = Uniform(u)
    return sampling.sample(logits_of(vector), settings_of(vector), rng, vector["seen"])


def kept_ids(logits: Array) -> list[int]:
    return [int(token) for token in np.flatnonzero(logits > -np.inf)]


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_the_penalty_and_the_order(vector: Vector) -> None:
    """SAMPLE-3, and the ties of SAMPLE-2."""
    penalised = sampling.penalise_repetition(logits_of(vector), vector["seen"], read(vector["repetition_penalty"]))
    assert penalised.tolist() == [read(text) for text in vector["expected"]["penalised"]]
    order = [int(token) for token in sampling.falling_order(penalised) if penalised[token] > -np.inf]
    assert order == vector["expected"]["order"]


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["temperature"] == "0"], ids=name_of)
def test_the_greedy_choice(vector: Vector) -> None:
    """SAMPLE-1, SAMPLE-2."""
    assert chosen(vector) == vector["expected"]["token"]


@pytest.mark.parametrize("vector", DRAWN, ids=name_of)
def test_what_is_kept_and_how_probable_it_is(vector: Vector) -> None:
    """SAMPLE-4 to SAMPLE-6."""
    expected, settings = vector["expected"], settings_of(vector)
    penalised = np.array([read(text) for text in expected["penalised"]])
    kept = sampling.apply_temperature(penalised, settings.temperature)
    if settings.top_k is not None:
        kept = sampling.keep_top_k(kept, settings.top_k)
    assert kept_ids(kept) == expected["kept_top_k"]
    kept = sampling.keep_top_p(kept, settings.top_p)
    assert kept_ids(kept) == expected["kept"]
    weights = sampling.relative_probabilities(kept)
    for token, stated in zip(expected["kept"], expected["probabilities"], strict=True):
        value = Fraction(float(weights[token] / weights.sum()))
        assert contains(stated, value, ROUNDING * value)


@pytest.mark.parametrize("vector", DRAWN, ids=name_of)
def test_the_draws(vector: Vector) -> None:
    """SAMPLE-1 and SAMPLE-7, through `sample` as a whole."""
    assert [chosen(vector, draw["u"]) for draw in vector["expected"]["draws"]] == [
        draw["token"] for draw in vector["expected"]["draws"]
    ]


def test_every_margin_is_far_from_a_rounding_or_exactly_nothing() -> None:
    """A margin of 0 is for 2^n equal logits, whose probabilities and their sums are exact in any binary arithmetic."""
    for vector in DRAWN:
        expected = vector["expected"]
        stages = [(expected["kept_top_k"], expected.get("top_p_margin", "1"))]
        stages += [(expected["kept"], draw["margin"]) for draw in expected["draws"]]
        for tokens, margin in stages:
            exact = len({expected["penalised"][token] for token in tokens}) == 1 and len(tokens).bit_count() == 1
            assert float(margin) > 0.01 or (margin == "0" and exact), vector["name"]
