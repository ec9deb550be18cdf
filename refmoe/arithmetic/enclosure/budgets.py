"""Error budgets: what a library function such as exp may err by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from refmoe.arithmetic.formats import Format


@dataclass(frozen=True)
class Budget:
    """The error of a library function: at most `constant + slope * |x|` unit roundoffs of the statistics dtype.

    A tolerance, not a consequence of arithmetic: nothing but its author bounds an engine's exp.
    """

    constant: float
    slope: float
    source: str


class Budgets(Protocol):
    """The budgets and dtypes that the rules of `functions` need. A policy has them."""

    @property
    def exp(self) -> Budget: ...
    @property
    def angles(self) -> Budget: ...
    @property
    def circle(self) -> Budget: ...
    @property
    def sigmoid(self) -> str: ...
    @property
    def accumulation(self) -> Format: ...
    @property
    def statistics(self) -> Format: ...
