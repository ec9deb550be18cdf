# SPDX-License-Identifier: Apache-2.0
"""A grammar of faults of one step, searched by their effect.

A fault has three parts: a change (another order, a factor, a value from elsewhere, another setting), a place (the
output of the step, an input, its matrix) and the rows that it acts in. The change is read off the trace's values where
an inverse exists, and tried otherwise. Each is then proven: the step is enclosed under the fault, and every check of the
step must pass, in exactly the rows that are named.
"""

from refmoe.verifier.diagnosis.grammar.search import of_grammar

__all__ = ["of_grammar"]
