# SPDX-License-Identifier: Apache-2.0
"""`golden/vectors/losses.json`: the auxiliary losses of hand-made tables, in ball arithmetic.

The equations are written out again for lists of balls; nothing of refmoe is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import flint

from tests.vectors.loss_tables import BALANCING, Z_LOSS, Table
from tests.vectors.numbers import ball, decimal, enclosure, precise

WHY = "The auxiliary losses of a router, load balancing and router z-loss, on hand-made tables of router logits."
SOURCE = (
    "Load balancing: load_balancing_loss_func of transformers 5.23 (models/mixtral/modeling_mixtral.py), in exact "
    "arithmetic; Fedus et al. 2021, eq. 4-6 where top_k is 1 and there is one layer. Router z-loss: Zoph et al. 2022, "
    "eq. 5. Values: computed with Arb from the tables by tests/vectors/losses.py, without refmoe."
)


@precise
def build() -> dict[str, Any]:
    """The whole file."""
    return {
        "format_version": "1",
        "kind": "losses",
        "why": WHY,
        "source": SOURCE,
        "generator": {"python-flint": flint.__version__},
        "vectors": [vector(table) for table in [*BALANCING, *Z_LOSS]],
    }


def vector(table: Table) -> dict[str, Any]:
    """One vector with its expected value, which must enclose the exact value of the table."""
    pool = [
        [Fraction(value) for value in row]
        for layer in table.layers
        for sequence, rows in enumerate(layer)
        for position, row in enumerate(rows)
        if table.mask is None or table.mask[sequence][position] == "1"
    ]
    written = [[[[decimal(Fraction(v)) for v in row] for row in rows] for rows in layer] for layer in table.layers]
    result: dict[str, Any] = {
        "name": table.name,
        "why": table.why,
        "kind": "load-balancing" if table.k else "router-z",
        "clauses": clauses(table),
        "bugs": list(table.bugs),
    }
    if table.k:
        chosen = [choices(row, table.k) for row in pool]
        experts = range(len(pool[0]))
        value = load_balancing(pool, chosen)
        result |= {"top_k": table.k, "layers": written}
        counts = {"counts": [sum(e in row for row in chosen) for e in experts]}
        result["ties"] = any(row[kept[-1]] == row[e] for row, kept in zip(pool, chosen, strict=True)
                             for e in experts if e not in kept)  # fmt: skip
    else:
        value, counts = z_loss(pool), {}
        result["logits"] = written[0]
    result["mask"] = table.mask and [[int(flag) for flag in row] for row in table.mask]
    assert table.exact is None or value.contains(ball(table.exact))
    result["expected"] = {**counts, "loss": enclosure(value if table.exact is None else table.exact)}
    return result


def clauses(table: Table) -> list[str]:
    """The clauses of refmoe/routers/literature/losses.py that the vector exercises."""
    if not table.k:
        return ["AUX-6", "AUX-7"] + ["AUX-8"] * (table.mask is not None)
    several = ["AUX-4"] * (len(table.layers) > 1)
    return ["AUX-1", "AUX-2", "AUX-3", *several, *["AUX-5"] * (table.mask is not None)]


def choices(row: Sequence[Fraction], k: int) -> list[int]:
    """The ids of the k largest, the lower id on ties."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def load_balancing(pool: list[list[Fraction]], chosen: list[list[int]]) -> Any:
    """E times the sum of f_e P_e over the rows of all layers together, as a ball."""
    tokens, experts = len(pool), len(pool[0])
    probability = [flint.arb(0)] * experts
    for row in pool:
        exponentials = [ball(value).exp() for value in row]
        total = sum(exponentials, flint.arb(0))
        probability = [p + e / total for p, e in zip(probability, exponentials, strict=True)]
    counts = [sum(e in row for row in chosen) for e in range(experts)]
    return sum((n * p for n, p in zip(counts, probability, strict=True)), flint.arb(0)) * experts / tokens**2


def z_loss(pool: list[list[Fraction]]) -> Any:
    """The mean square of log-sum-exp, as a ball. Arb's exponents do not overflow."""
    logs = [sum((ball(value).exp() for value in row), flint.arb(0)).log() for row in pool]
    return sum((z * z for z in logs), flint.arb(0)) / len(pool)
