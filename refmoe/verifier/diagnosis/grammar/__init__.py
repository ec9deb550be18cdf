# SPDX-License-Identifier: Apache-2.0
"""A grammar of faults of one step, searched by their effect.

A fault is a change, its place, and the rows that it acts in. The change is another order, a factor, a value from
elsewhere or another setting. The place is the output of the step, an input or its matrix. The change is read off the
trace's values where an inverse exists, and tried otherwise. Each is then proven: the step is enclosed under the fault.
Every check of the step must pass, with the fault in exactly the rows that are named.
"""

from refmoe.verifier.diagnosis.grammar.search import of_grammar

__all__ = ["of_grammar"]
