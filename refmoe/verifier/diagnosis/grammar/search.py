# SPDX-License-Identifier: Apache-2.0
"""The search of the grammar: every failed step, every view of it, every family of faults, and the proofs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from refmoe.spec.taps import READ_OUT_TAPS
from refmoe.verifier.diagnosis.evidence import Evidence
from refmoe.verifier.diagnosis.grammar.elsewhere import elsewhere
from refmoe.verifier.diagnosis.grammar.factors import factors
from refmoe.verifier.diagnosis.grammar.fault import SPARE, Fault, Proof, Search
from refmoe.verifier.diagnosis.grammar.masks import masks
from refmoe.verifier.diagnosis.grammar.matrices import matrices
from refmoe.verifier.diagnosis.grammar.norms import norms
from refmoe.verifier.diagnosis.grammar.operands import operands
from refmoe.verifier.diagnosis.grammar.orders import orders
from refmoe.verifier.diagnosis.grammar.pointwise import pointwise
from refmoe.verifier.diagnosis.grammar.rotation import rotation
from refmoe.verifier.diagnosis.grammar.softmaxes import softmaxes
from refmoe.verifier.diagnosis.grammar.views import inputs, output
from refmoe.verifier.findings import STRUCTURE, Explanation, proven


def of_grammar(evidence: Evidence) -> list[Explanation]:
    """The fault of each failed step that has one in the grammar, in order of computation."""
    found: list[tuple[str, list[Proof]]] = []
    with np.errstate(all="ignore"):
        for step in dict.fromkeys(check.step for check in evidence.failed):
            proofs = proofs_of(evidence, step)
            if proofs:
                found.append((step, proofs))
    return [_explanation(step, proofs) for step, proofs in found]


def proofs_of(evidence: Evidence, step: str) -> list[Proof]:
    """The faults that explain a failed step, the shortest description first."""
    if step in ("router.experts", *READ_OUT_TAPS):
        return []
    search = Search(evidence, step)
    return search.proofs(hypotheses(search)) if search.usable else []


def hypotheses(search: Search) -> Iterator[Fault]:
    """Every fault of the grammar that may explain the step."""
    for view in (output(search), *inputs(search)):
        for family in (factors, orders, elsewhere, pointwise):
            yield from family(search, view)
    for kind in (norms, rotation, softmaxes, masks, operands, matrices):
        yield from kind(search)


def _explanation(step: str, proofs: list[Proof]) -> Explanation:
    best = proofs[0]
    rivals = dict.fromkeys(f"{step}: {each.fault.name}" for each in proofs[1:] if each.bits <= best.bits + SPARE)
    words = f" {best.where.words}" if best.where.words else ""
    found = proven(
        name=f"{step}: {best.fault.name}",
        kind=STRUCTURE,
        about=f"in {step}{words}, {best.fault.about}",
        fix=best.fault.fix,
        coefficient=best.coefficient,
        residual=best.residual,
        values=best.values,
        where=best.where.words,
    )
    return replace(found, rivals=tuple(name for name in rivals if name != found.name))
