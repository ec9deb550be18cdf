# SPDX-License-Identifier: Apache-2.0
"""`golden/vectors/sampler.json`: choosing a token, from hand-made logits, in rational numbers and ball arithmetic.

A decision is whether p is reached, or whether the cumulative probability exceeds u. It is made by rational numbers
where all kept tokens have one logit, and proven by balls elsewhere.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from typing import Any

import flint

from tests.vectors.numbers import ball, decimal, enclosure, precise
from tests.vectors.sampler_tables import TABLES, Table

WHY = "Choosing the next token from logits: repetition penalty, temperature, top-k, top-p and the draw, stage by stage."
SOURCE = (
    "Repetition penalty: Keskar et al. 2019, section 4.1, with the correction for negative logits of transformers "
    "issue 2302. Top-k: Fan et al. 2018. Top-p: Holtzman et al. 2020, eq. 2. The draw: inversion of the cumulative "
    "distribution by id, as refmoe defines it. Values: rational numbers and Arb, by tests/vectors/sampler.py, "
    "without refmoe."
)
Probability = Any
"""A Fraction, or a ball."""


@precise
def build() -> dict[str, Any]:
    """The whole file."""
    return {
        "format_version": "1",
        "kind": "sampler",
        "why": WHY,
        "source": SOURCE,
        "generator": {"python-flint": flint.__version__},
        "vectors": [vector(table) for table in TABLES],
    }


def vector(table: Table) -> dict[str, Any]:
    """One vector with the result of each stage."""
    penalised = penalise(table)
    logits = {token: Fraction(text) for token, text in enumerate(penalised) if text != "-inf"}
    order = sorted(logits, key=lambda token: (-logits[token], token))
    expected: dict[str, Any] = {"penalised": penalised, "order": order}
    if Fraction(table.temperature) == 0:
        expected["token"] = order[0]
    else:
        expected |= filtered(table, logits, order)
    return {
        "name": table.name,
        "why": table.why,
        "kind": "sampler",
        "clauses": list(table.clauses),
        "bugs": list(table.bugs),
        "logits": list(table.logits),
        "seen": list(table.seen),
        "repetition_penalty": table.penalty,
        "temperature": table.temperature,
        "top_k": table.top_k,
        "top_p": table.top_p,
        "expected": expected,
    }


def penalise(table: Table) -> list[str]:
    """The logits after the repetition penalty. Unchanged logits keep their spelling."""
    result = list(table.logits)
    penalty = Fraction(table.penalty)
    for token in set(table.seen):
        if table.logits[token] != "-inf" and Fraction(table.logits[token]) != 0:
            value = Fraction(table.logits[token])
            result[token] = decimal(value / penalty if value > 0 else value * penalty)
    return result


def filtered(table: Table, logits: dict[int, Fraction], order: list[int]) -> dict[str, Any]:
    """The tokens that top-k and top-p keep, their probabilities, and the draws."""
    first = order if table.top_k is None else order[: table.top_k]
    p = Fraction(table.top_p)
    sums = list(accumulate(probabilities(logits, first, table.temperature)))
    count = len(first) if p == 1 else next(n for n, total in enumerate(sums, start=1) if reaches(total, p))
    kept = sorted(first[:count])
    final = probabilities(logits, kept, table.temperature)
    result: dict[str, Any] = {"kept_top_k": sorted(first), "kept": kept}
    if p != 1:
        result["top_p_margin"] = margin(p, [*sums[:-1], Fraction(1)])
    result["probabilities"] = [enclosure(value) for value in final]
    result["draws"] = [drawn(Fraction(u), u, kept, list(accumulate(final))) for u in table.draws]
    return result


def probabilities(logits: dict[int, Fraction], tokens: list[int], temperature: str) -> list[Probability]:
    """The softmax of these tokens' logits over the temperature, in the order of `tokens`."""
    if len({logits[token] for token in tokens}) == 1:
        return [Fraction(1, len(tokens))] * len(tokens)
    exponentials = [ball(logits[token] / Fraction(temperature)).exp() for token in tokens]
    total = sum(exponentials, flint.arb(0))
    return [value / total for value in exponentials]


def reaches(total: Probability, threshold: Fraction) -> bool:
    """Whether total >= threshold, proven either way. No caller asks about the sum of all balls, which encloses 1."""
    if isinstance(total, Fraction):
        return total >= threshold
    above, below = bool(total > ball(threshold)), bool(total < ball(threshold))
    assert above != below
    return above


def drawn(u: Fraction, text: str, tokens: list[int], sums: list[Probability]) -> dict[str, Any]:
    """The first token by id whose cumulative probability exceeds u, and how far u is from a boundary."""
    inner = sums[:-1]
    at = sum(total <= u if isinstance(total, Fraction) else not reaches(total, u) for total in inner)
    return {"u": text, "token": tokens[at], "margin": margin(u, inner)}


def margin(value: Fraction, boundaries: list[Probability]) -> str:
    """The distance to the nearest boundary, rounded down to a multiple of 1/10000: "0" only where it is exactly 0."""
    distances = [abs(total - (value if isinstance(total, Fraction) else ball(value))) for total in boundaries]
    if not distances:
        return "1"
    if any(distance == 0 for distance in distances):
        return "0"
    scaled = [distance * 10000 for distance in distances]
    units = min(int(d if isinstance(d, Fraction) else d.lower().floor().unique_fmpz()) for d in scaled)
    assert units > 0
    return f"{units / 10000:.4f}"  # the quotient has an error of 2^-53 in binary64, the text has none
