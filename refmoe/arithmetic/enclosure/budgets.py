# SPDX-License-Identifier: Apache-2.0
"""Error budgets: the errors that library functions such as exp may make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from refmoe.arithmetic.formats import Format


@dataclass(frozen=True)
class Budget:
    """The error of a library function: at most `constant + slope * |x|` unit roundoffs of the statistics dtype.

    A budget is a tolerance. It does not follow from arithmetic: only its author bounds the error of an engine's exp.
    """

    constant: float
    slope: float
    source: str
    """The document or the measurement that the numbers come from."""


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
