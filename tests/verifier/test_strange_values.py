# SPDX-License-Identifier: Apache-2.0
"""Strange values in one step or everywhere: no diagnosis, report or distance raises, or warns of an overflow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.bugs.catalogue import MUTANTS
from refmoe.profiles.load import policy
from refmoe.report.html import to_html
from refmoe.report.verification_json import to_json
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis import explained, gather
from refmoe.verifier.diagnosis.grammar.fault import MOST_REFUTED, MOST_TRIED, Fault, Predict, Search
from refmoe.verifier.distances import compare_traces
from refmoe.verifier.findings import KNOWN_BUG, NOT_CONFORMANT
from tests.bugs.judging import case_named, diagnosed, judged, parameters_of, traced

CASE, DTYPE = "one-pair", "float64"
VALUES = (1e200, 1e300, 1e308, -1e308, np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e-310)
STEPS = ("attention.scores", "router.weights")
"""The ends of the keys that are filled. Every key ends with the empty string."""
SOME = [*MUTANTS.values()][::12]
"""A part of the catalogue, because each diagnosis tries all that it is given."""


def filled(value: float, step: str) -> Trace:
    """An honest trace with one value in all places of a step."""
    honest = traced(None, CASE, DTYPE)
    arrays: dict[str, Any] = {key: np.array(tensor.get()) for key, tensor in honest.tensors.items()}
    for key, array in arrays.items():
        if key.endswith(step) and not key.endswith("router.experts"):
            arrays[key] = np.full(array.shape, value)
    return held_trace(honest.header, arrays)


@pytest.mark.parametrize("step", [*STEPS, ""], ids=[*STEPS, "everywhere"])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_no_value_makes_a_diagnosis_raise_or_warn(value: float, step: str) -> None:
    survives(value, step)


def survives(value: float, step: str) -> None:
    """Diagnose, report and compare a trace that is filled so. An exception or a warning is an error of the test."""
    trace = filled(value, step)
    report = judged(trace, CASE, DTYPE)
    assert report.verdict == NOT_CONFORMANT
    found = diagnosed(trace, CASE, DTYPE, report, SOME)
    assert KNOWN_BUG not in {each.kind for each in found if each.explains}
    report = explained(report, found)
    assert to_json(report)
    assert to_html(report)
    assert compare_traces(trace, traced(None, CASE, DTYPE)).distances


# ---- the limit of a search


@pytest.mark.parametrize(
    ("predict", "most"),
    [
        (lambda lab, key: None, MOST_TRIED),
        (lambda lab, key: Enclosure(lab.found(key) * 1.001), MOST_REFUTED),  # near, and not what was found
    ],
    ids=["far", "near"],
)
def test_a_search_in_vain_ends(predict: Predict, most: int) -> None:
    """However many faults come close to what was found."""
    case, trace = case_named(CASE), filled(2.0, "attention.scores")
    report = judged(trace, CASE, DTYPE)
    evidence = gather(trace, case.config, parameters_of(CASE), case.runs(), policy(DTYPE), report)
    tried: list[None] = []

    def endless() -> Iterator[Fault]:
        while True:
            tried.append(None)
            yield Fault(name="", about="", fix="", bits=0.0, predict=predict)

    assert Search(evidence, "attention.scores").proofs(endless()) == []
    assert len(tried) == most
