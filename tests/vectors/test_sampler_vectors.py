"""`sampler.json` against refmoe, stage by stage, and against the known bugs of samplers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from refmoe.text import sampling
from refmoe.text.sampling import SamplingSettings
from tests.vectors.files import load
from tests.vectors.numbers import contains, read

Vector = dict[str, Any]
Array = NDArray[Any]
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
    """A generator whose next number is known."""

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


def pipeline(
    vector: Vector, top_p: Callable[[Array, float], int] | None = None, divide_always: bool = False
) -> tuple[list[float], list[int]]:
    """The penalised logits and the kept set, written out again with room for a mistake.

    top_p: from the probabilities in falling order and p, how many to keep.
    """
    logits, settings = logits_of(vector), settings_of(vector)
    for token in set(vector["seen"]):
        divide = divide_always or logits[token] > 0
        factor = settings.repetition_penalty
        logits[token] = logits[token] / factor if divide else logits[token] * factor
    order = sorted(np.flatnonzero(logits > -np.inf).tolist(), key=lambda token: (-logits[token], token))
    if settings.temperature == 0:
        return logits.tolist(), order[:1]
    order = order[: settings.top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / settings.temperature)
    probabilities = weights / weights.sum()
    count = (top_p or reaching)(probabilities, settings.top_p)
    return logits.tolist(), sorted(order[:count])


def reaching(probabilities: Array, p: float) -> int:
    """Those before which the sum is below p; all where p is 1."""
    before = np.cumsum(probabilities) - probabilities
    return len(probabilities) if p == 1 else int((before < p).sum())


def crossing_excluded(probabilities: Array, p: float) -> int:
    return int((np.cumsum(probabilities) <= p).sum()) if p < 1 else len(probabilities)


def first_crossing(probabilities: Array, p: float) -> int:
    """Up to the first sum above p; where there is none, argmax says 0, and the first token is all that is kept."""
    sums = np.minimum(np.cumsum(probabilities), 1.0)  # a sum rounded above 1 would hide the mistake at p = 1
    return int(np.argmax(sums > p)) + 1


VARIATIONS: dict[str, tuple[Callable[[Vector], tuple[list[float], list[int]]], str]] = {
    "samp-topp-excludes-crossing": (lambda vector: pipeline(vector, crossing_excluded), "top-p-crossing"),
    "samp-topp-one-greedy": (lambda vector: pipeline(vector, first_crossing), "top-p-one-flat"),
    "samp-penalty-negative-logit": (lambda vector: pipeline(vector, divide_always=True), "penalty-negative"),
}
UNSEEN = {
    "gen-pad-eq-eos": "masks attention, not logits: the ids of the tokenizer vector chat-five-turns show it in a trace"
}


def answer(vector: Vector) -> tuple[list[float], list[int]]:
    expected = vector["expected"]
    return [read(text) for text in expected["penalised"]], expected.get("kept", [expected.get("token")])


def test_the_variations_vary_from_the_right_answer() -> None:
    assert [vector["name"] for vector in VECTORS if pipeline(vector) != answer(vector)] == []


@pytest.mark.parametrize("bug", VARIATIONS)
def test_each_known_bug_is_caught(bug: str) -> None:
    """The vector named here catches it, and so does each vector that says so."""
    variation, name = VARIATIONS[bug]
    caught = {vector["name"] for vector in VECTORS if variation(vector) != answer(vector)}
    assert name in caught
    claimed = {vector["name"] for vector in VECTORS if bug in vector["bugs"]}
    assert name in claimed
    assert claimed - caught == set()


def test_no_vector_claims_a_bug_without_a_variation() -> None:
    assert {bug for vector in VECTORS for bug in vector["bugs"]} <= set(VARIATIONS) - set(UNSEEN)
