# SPDX-License-Identifier: Apache-2.0
"""All bugs of quantised matrices. Importing a module registers its bugs."""

from __future__ import annotations

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import Mutant
from refmoe.bugs.quantised import blocks, folders, fp8_inputs, inputs, sums
from refmoe.bugs.quantised.bug import QUANTISED, QuantisedBug
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.rows import RowWeight
from refmoe.profiles.cut_points import product_of
from refmoe.spec.model import Parameters


def bugs_of(parameters: Parameters) -> tuple[QuantisedBug, ...]:
    """The bugs that a model can show, by the formats of its matrices."""
    weights = named_weights(parameters).values()
    there = {each.format for each in weights if isinstance(each, RowWeight) and product_of(each) is not None}
    return tuple(bug for bug in QUANTISED.values() if there.intersection(bug.formats))


def known_bugs(parameters: Parameters) -> tuple[Mutant, ...]:
    """All known bugs that an engine may have with these parameters: the catalogue, and those of their formats."""
    return (*MUTANTS.values(), *bugs_of(parameters))


__all__ = ["QUANTISED", "blocks", "bugs_of", "folders", "fp8_inputs", "inputs", "known_bugs", "sums"]
