"""What a golden case makes visible: conditions that its case.toml declares and its trace must bear out.

A known bug shows only where something holds: a decode step, a tie, a window that hides a token. Each such thing is a
predicate here, so that `conditions` in a case.toml is not a label but a claim: the declared ones are exactly those that
hold. `python -m refmoe.suite.conditions --write` makes the table `golden/CASES.md`.
"""

from refmoe.suite.conditions.observed import CONDITIONS, Observed
from refmoe.suite.conditions.table import NOT_OF_A_CASE, golden_arrays, holding, mistakes, render

__all__ = ["CONDITIONS", "NOT_OF_A_CASE", "Observed", "golden_arrays", "holding", "mistakes", "render"]
