# SPDX-License-Identifier: Apache-2.0
"""Write golden/dot-vectors.json: sums of products with their correctly rounded values, by rational arithmetic alone.

Run by hand, ``python -m tests.arithmetic.generate_dot_vectors``; nothing of refmoe is used. Numbers are hexadecimal
floats.
"""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction
from pathlib import Path

PATH = Path(__file__).parent.parent.parent / "golden" / "dot-vectors.json"
TINY = 2.0**-1074
Vector = list[float]


def rounded(a: Vector, b: Vector) -> float:
    """The value of DOT-1 and DOT-2."""
    products = [x * y for x, y in zip(a, b, strict=True) if not (math.isfinite(x) and math.isfinite(y))]
    if products:
        return math.nan if len({str(p) for p in products}) > 1 or math.isnan(products[0]) else products[0]
    total = sum((Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)), Fraction(0))
    try:
        return float(total)
    except OverflowError:
        return math.inf if total > 0 else -math.inf


def cases() -> dict[str, tuple[Vector, Vector]]:
    """The factors to multiply and sum, by the property that they show."""
    draw = random.Random(1)
    inf, nan, big = math.inf, math.nan, 2.0**1023

    def spread(n: int, exponents: int) -> Vector:
        return [draw.uniform(-1, 1) * 2.0 ** draw.randint(-exponents, exponents) for _ in range(n)]

    random_cases = {
        f"random, n = {n}, exponents to {e}": (spread(n, e), spread(n, e)) for n in (1, 2, 7, 40) for e in (0, 30)
    }
    x = spread(20, 8)
    return random_cases | {
        "no terms": ([], []),
        "all zero, of both signs": ([0.0, -0.0], [-1.0, 0.0]),
        "negative zero alone": ([-0.0], [1.0]),
        "exact cancellation": ([*x, *x], [1.0] * 20 + [-1.0] * 20),
        "cancellation that leaves the last product's error": ([1 + 2.0**-52, -1 - 2.0**-51], [1 + 2.0**-52, 1.0]),
        "a tie goes to even, down": ([1.0, 2.0**-53], [1.0, 1.0]),
        "a tie goes to even, up": ([1 + 2.0**-52, 2.0**-53], [1.0, 1.0]),
        "a tie broken upwards by the smallest number": ([1.0, 2.0**-53, TINY], [1.0, 1.0, 1.0]),
        "a tie broken downwards by the smallest number": ([1 + 2.0**-52, 2.0**-53, -TINY], [1.0, 1.0, 1.0]),
        "order matters to others": ([1e16, 1.0, -1e16, 1.0], [1.0, 1.0, 1.0, 1.0]),
        "products that underflow alone, not together": ([2.0**-600] * 4, [2.0**-474 * 0.375] * 4),
        "a subnormal result, rounded once": ([2.0**-537 * 1.5, TINY], [2.0**-537 * 1.25, 0.25]),
        "half the smallest number": ([TINY], [0.5]),
        "just above half the smallest number": ([TINY, TINY], [0.5, 2.0**-60]),
        "partial sums that overflow, a result that does not": ([big, big, -big], [1.0, 1.0, 1.0]),
        "products that overflow, a result that does not": ([2.0**600, 2.0**600], [2.0**600, -(2.0**600)]),
        "overflow": ([big, big], [1.0, 1.0]),
        "just below the overflow threshold": ([2.0**1023 * (2 - 2.0**-52), 2.0**969], [1.0, 1.0]),
        "on the overflow threshold": ([2.0**1023 * (2 - 2.0**-52), 2.0**970], [1.0, 1.0]),
        "an infinity": ([inf, 1.0], [1.0, -1.0]),
        "infinities of both signs": ([inf, -inf], [1.0, 1.0]),
        "infinity times zero": ([inf, 1.0], [0.0, 1.0]),
        "not a number": ([1.0, nan], [1.0, 1.0]),
    }  # fmt: skip


def document() -> str:
    """The file's text."""
    vectors = [
        {"why": why, "a": [v.hex() for v in a], "b": [v.hex() for v in b], "sum": rounded(a, b).hex()}
        for why, (a, b) in cases().items()
    ]
    head = {
        "format_version": "1",
        "why": "sum of a[i] * b[i]: the exact real value rounded once (DOT-1, DOT-2 of dot.md); every NaN is the same",
    }
    return json.dumps(head | {"vectors": vectors}, indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(document())
