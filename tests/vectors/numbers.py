# SPDX-License-Identifier: Apache-2.0
"""The numbers of vector files: exact decimals, and proven enclosures of numbers without an exact decimal."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import flint

PLACES = 40
precise = flint.ctx.workprec(512)  # decorates what computes balls: far narrower than the radius that is written

Enclosure = dict[str, str]
"""{"exact": "3/4"}, or {"midpoint": decimal, "radius": decimal} around the real number."""


def ball(value: Fraction) -> Any:
    """A rational number as an Arb ball."""
    return flint.arb(value.numerator) / value.denominator


def decimal(value: Fraction) -> str:
    """A dyadic rational as the decimal number that equals it."""
    with localcontext() as context:
        context.prec = 1000
        text = format(Decimal(value.numerator) / Decimal(value.denominator), "f")
    assert Fraction(text) == value
    return text


def enclosure(value: Any) -> Enclosure:
    """A rational number exactly, or a ball as a decimal midpoint and radius that are proven to enclose it."""
    if isinstance(value, Fraction):
        return {"exact": str(value)}
    units = int((value * 10**PLACES).mid().floor().unique_fmpz())
    with localcontext() as context:
        context.prec = 200
        midpoint = format(Decimal(units).scaleb(-PLACES), "f")
    radius = Fraction(2, 10**PLACES)
    assert abs(value - ball(Fraction(midpoint))) < ball(radius)
    return {"midpoint": midpoint, "radius": f"2e-{PLACES}"}


def contains(stated: Enclosure, value: Fraction, slack: Fraction) -> bool:
    """Whether `value` is within `slack` of the stated number."""
    if "exact" in stated:
        return abs(Fraction(stated["exact"]) - value) <= slack
    return abs(Fraction(stated["midpoint"]) - value) <= slack + Fraction(stated["radius"])


def read(text: str) -> float:
    """A decimal of a vector file, or "-inf", as the float that equals it."""
    value = float(text)
    assert text == "-inf" or Fraction(value) == Fraction(text)
    return value
