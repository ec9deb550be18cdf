# SPDX-License-Identifier: Apache-2.0
"""Strange values in one step or everywhere: no diagnosis, report or distance raises, or warns of an overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.report.html import to_html
from refmoe.report.verification_json import to_json
from refmoe.traces.held import held_trace
from refmoe.traces.trace import Trace
from refmoe.verifier.diagnosis import explained
from refmoe.verifier.distances import compare_traces
from refmoe.verifier.findings import KNOWN_BUG, NOT_CONFORMANT
from tests.bugs.judging import diagnosed, judged, traced

CASE, DTYPE = "one-pair", "float64"
VALUES = (1e200, 1e300, -1e308, np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e-310)
STEPS = ("attention.scores", "router.weights")
"""The ends of the keys that are filled."""
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


@pytest.mark.parametrize(
    "value", [pytest.param(value, marks=[pytest.mark.slow] * (0 < value < 1e-300)) for value in VALUES], ids=repr
)
def test_no_value_in_a_step_makes_a_diagnosis_raise_or_warn(value: float) -> None:
    for step in STEPS:
        survives(value, step)


@pytest.mark.parametrize(
    "value", [pytest.param(value, marks=[pytest.mark.slow] * (value != -1e308)) for value in VALUES], ids=repr
)
def test_no_value_everywhere_makes_a_diagnosis_raise_or_warn(value: float) -> None:
    survives(value, "")


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
