# SPDX-License-Identifier: Apache-2.0
"""Conditions of golden cases: predicates that a case.toml declares, and that the case's trace must satisfy.

A known bug shows only under some condition: a decode step, a tie, a window that hides a token. A test checks that each
case declares exactly the conditions that hold in its trace. `python -m refmoe.suite.conditions --write` writes
`golden/CASES.md`, the table of cases and conditions.
"""

from refmoe.suite.conditions.observed import CONDITIONS, Observed
from refmoe.suite.conditions.table import NOT_OF_A_CASE, golden_arrays, holding, mistakes, render

__all__ = ["CONDITIONS", "NOT_OF_A_CASE", "Observed", "golden_arrays", "holding", "mistakes", "render"]
