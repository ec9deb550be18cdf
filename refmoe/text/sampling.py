# SPDX-License-Identifier: Apache-2.0
"""Choose the next token from logits: pure functions on a vector of V floats, computed in binary64.

A logit of -inf excludes its token; every filter here excludes tokens in that way and returns a new array.
The order is fixed: repetition penalty, temperature, top-k, top-p, then one draw.

The generator is NumPy's PCG64 with `Generator.random()`, whose stream of numbers NumPy keeps stable.
`Generator.choice` may change its algorithm, so it is not used. `exp` can differ in its last bit between machines. A
draw can then differ too, if its uniform number falls within one rounding of a boundary. Greedy choices cannot differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from sys import float_info
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.errors import InputError

Logits = NDArray[np.float64]


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose a token; by default, greedily. Raises InputError for a value outside its range."""

    temperature: float = 0.0  # 0 or more; 0 is greedy
    top_k: int | None = None  # 1 or more; None keeps all
    top_p: float = 1.0  # above 0, at most 1
    repetition_penalty: float = 1.0  # above 0; above 1 discourages repetition

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or self.temperature < 0:
            raise InputError(f"temperature is {self.temperature!r}, but a number, 0 or more, was expected")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k is {self.top_k!r}, but a whole number, 1 or more, or None was expected")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p!r}, but a number above 0 and at most 1 was expected")
        if not is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise InputError(f"repetition_penalty is {self.repetition_penalty!r}, but a number above 0 was expected")


def is_number(value: object) -> bool:
    """Is it a finite int or float? A bool is neither here: `temperature=True` is a slip."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


def sample(logits: NDArray[Any], settings: SamplingSettings, rng: np.random.Generator, seen: Iterable[int] = ()) -> int:
    """The id of the next token.

    SAMPLE-1  The repetition penalty comes first, then temperature, top-k, top-p, and one draw. Temperature 0 means
              greedy, after the penalty.

    logits: [V]   seen: the ids that the repetition penalty is for, the prompt's and the reply's.
    One number is taken from `rng`, none when greedy. Raises InputError for logits that SAMPLE-8 refuses, or that are no
    vector of floats.
    """
    penalised = penalise_repetition(checked_logits(logits), seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return greedy(penalised)
    kept = apply_temperature(penalised, settings.temperature)
    if settings.top_k is not None:
        kept = keep_top_k(kept, settings.top_k)
    kept = keep_top_p(kept, settings.top_p)
    return draw(kept, rng.random())


def greedy(logits: Logits) -> int:
    """The token that is chosen at temperature 0. logits: [V]

    SAMPLE-2  Greedy takes the id of the largest logit, the lower id on ties.
    """
    return int(np.argmax(logits))  # NumPy documents that argmax returns the first of equals


def penalise_repetition(logits: Logits, seen: Iterable[int], penalty: float) -> Logits:
    """The logits with those of the tokens in `seen` lowered. logits: [V]   returns: [V]

    SAMPLE-3  The logit of each token seen is divided by the penalty if positive and multiplied by it if negative. This
              happens once, however often the token was seen.

    Raises InputError for a token outside the vocabulary.
    Keskar et al. 2019, section 4.1, always divide, which raises a negative logit.
    """
    tokens = np.fromiter(seen, dtype=np.int64)
    wrong = tokens[(tokens < 0) | (tokens >= logits.size)]
    if wrong.size:
        raise InputError(f"token {wrong[0]} was seen, but 0 to {logits.size - 1} was expected")
    result = logits.copy()
    with np.errstate(over="ignore"):  # computed from the original logits, so that a token seen twice is lowered once
        moved = np.where(logits[tokens] > 0, logits[tokens] / penalty, logits[tokens] * penalty)
    result[tokens] = np.minimum(moved, float_info.max)  # a tiny penalty must not make +inf
    return result


def apply_temperature(logits: Logits, temperature: float) -> Logits:
    """The logits divided by the temperature, less a constant. logits: [V]   returns: [V], the largest 0

    SAMPLE-4  Temperature t makes the probabilities proportional to exp(logit / t).

    The largest logit is subtracted first, which does not change the probabilities. Division by a small temperature can
    then overflow only to -inf, which is the limit.
    """
    with np.errstate(over="ignore"):
        return (logits - np.max(logits)) / temperature


def keep_top_k(logits: Logits, k: int) -> Logits:
    """The k largest logits, -inf in place of the others. logits: [V]   returns: [V]

    SAMPLE-5  Exactly k tokens are kept, those with the largest logits, the lower id on ties; all when k >= V.
    """
    return keep_only(logits, falling_order(logits)[:k])


def keep_top_p(logits: Logits, p: float) -> Logits:
    """The logits of the nucleus, -inf in place of the others. logits: [V]   returns: [V]

    SAMPLE-6  Tokens are taken by falling probability, the lower id first on ties, until their probabilities sum to p or
              more. The token that reaches p is kept, and p = 1 keeps all. The probabilities are those of the tokens not
              yet excluded, so after top-k they sum to 1 again.

    Holtzman et al. 2020, eq. 2.
    """
    if p == 1:  # a rounded sum can reach 1 too early
        return logits.copy()
    order = falling_order(logits)
    weights = relative_probabilities(logits)[order]
    cumulative = np.cumsum(weights)
    before = np.concatenate(([0.0], cumulative[:-1]))  # the sum before each token; while it is below p, take the token
    return keep_only(logits, order[before < p * cumulative[-1]])


def draw(logits: Logits, u: float) -> int:
    """One token, by inverting the cumulative distribution. logits: [V]   u: in [0, 1)

    SAMPLE-7  The draw takes one uniform number u from the generator. It is the first token, by id, at which the
              cumulative probability exceeds u. An excluded token is never drawn.

    u is multiplied by the sum S of the weights; the weights are not divided by S. The product stays below S, because u
    is at most 1 - 2^-53 and S is at least 1, so that S (1 - 2^-53) rounds to less than S.
    """
    cumulative = np.cumsum(relative_probabilities(logits))
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def checked_logits(logits: NDArray[Any]) -> Logits:
    """The logits in binary64.

    SAMPLE-8  NaN and +inf are refused, and so are logits that exclude every token. Raises InputError.

    logits: [V] in any floating-point type, bfloat16 included   returns: [V]
    """
    logits = np.asarray(logits)
    if logits.ndim != 1 or logits.size == 0:
        raise InputError(
            f"the logits have shape {list(logits.shape)}, but one number for each token, [V], was expected"
        )
    if logits.dtype.kind != "f" and logits.dtype.name != "bfloat16":
        raise InputError(f"the logits are of type {logits.dtype}, but a floating-point type was expected")
    values: Logits = logits.astype(np.float64)
    wrong = np.flatnonzero(np.isnan(values) | (values == np.inf))
    if wrong.size:
        raise InputError(
            f"the logit of token {wrong[0]} is {values[wrong[0]]}, but a finite number or -inf was expected"
        )
    if np.all(values == -np.inf):
        raise InputError("the logits are all -inf, but at least one token that can be chosen was expected")
    return values


def relative_probabilities(logits: Logits) -> Logits:
    """The probabilities up to a common factor: exp(logits - the largest logit). logits: [V]   returns: [V]"""
    return np.exp(logits - np.max(logits))


def falling_order(logits: Logits) -> NDArray[np.int64]:
    """The ids from the largest logit to the smallest, the lower id first on ties. logits: [V]   returns: [V]"""
    return np.argsort(-logits, kind="stable").astype(np.int64)


def keep_only(logits: Logits, tokens: NDArray[np.int64]) -> Logits:
    """The logits of `tokens`, -inf in place of the others. logits: [V]   returns: [V]"""
    result = np.full_like(logits, -np.inf)
    result[tokens] = logits[tokens]
    return result
