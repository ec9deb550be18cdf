# SPDX-License-Identifier: Apache-2.0
"""A bug of quantised matrices, and the register of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Required, TypedDict, Unpack

from refmoe.bugs.mutant import Mutant, prose_of
from refmoe.profiles.cut_points import PROJECTIONS

CODED = tuple(step for step in PROJECTIONS if step != "router.logits")
"""The products with quantised matrices. Published files leave the router's matrix as it is."""
STEPS = {matrix: step for step, (matrix, _) in PROJECTIONS.items()}
"""The product that reads a matrix, by the last part of the matrix's canonical name."""
EXPERTS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class QuantisedBug(Mutant):
    """One bug that only matrices in some formats can show."""

    formats: tuple[str, ...] = ()
    """These formats, as `refmoe info` prints them."""


QUANTISED: dict[str, QuantisedBug] = {}
"""All of them by name, in the order of `catalogue`."""


class Facts(TypedDict, total=False):
    """The facts that an entry states beside its docstring."""

    formats: Required[Iterable[str]]
    fix: Required[str]
    sources: Required[Iterable[str]]
    """Addresses on GitHub without their beginning."""
    only: Iterable[str]
    """The last parts of the names of the matrices that it concerns; left out: all in these formats."""
    by_size: bool
    judged_by: str
    """A change to the policy of the formats, under which the bug shows."""


def register(id: str, changes: str, function: Callable[..., Any], docstring: str, **facts: Unpack[Facts]) -> None:
    """Add a bug to the register. Raises ValueError when the name is taken.

    changes, function: as for `Mutant`   docstring: of the function that states the bug
    """
    if id in QUANTISED:
        raise ValueError(f"two bugs have the name {id}")
    only = tuple(facts.get("only", ()))
    QUANTISED[id] = QuantisedBug(
        id=id, about=prose_of(docstring), kind="quantised", function=function, changes=changes, fix=facts["fix"],
        touches=tuple(STEPS[name] for name in only) or CODED,
        sources=tuple(f"https://github.com/{source}" for source in facts["sources"]),
        by_size=facts.get("by_size", False), judged_by=facts.get("judged_by", ""), formats=tuple(facts["formats"]),
    )  # fmt: skip
