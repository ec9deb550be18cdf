# SPDX-License-Identifier: Apache-2.0
"""The derived epsilon: by hand for one value, in exact fractions for a trace, and against the verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import BFLOAT16, FLOAT32
from refmoe.errors import InputError
from refmoe.evidence.given import read_given
from refmoe.evidence.judged import Width, judge_trace, width
from refmoe.evidence.layout import EPSILON
from refmoe.suite import read_manifest, trace_path
from refmoe.traces.trace import read_trace, trace_bytes
from refmoe.verifier.findings import NOT_CONFORMANT
from tests.evidence.conftest import Made
from tests.evidence.tamperings import TRACE


def of_one(x: Enclosure, *formats: Any, limit: float = 10.0) -> Width:
    return width(x, formats, np.ones(x.shape, bool), limit)


def near(found: float, expected: float) -> bool:
    """Equal, or rounded up by a few last bits."""
    return expected <= found <= expected * (1 + 2**-50)


def test_the_width_of_a_value_by_hand() -> None:
    """Of bfloat16 the neighbours of 1 are 1 - 2^-8 and 1 + 2^-7. 0.99 rounds to 253/256, and 1.01 to 129/128."""
    assert float(ml_dtypes.bfloat16(0.99)) == 253 / 256
    x = Enclosure(np.array([1.0]), np.array([0.01]), np.array([0.001**2]))
    assert near(of_one(x, BFLOAT16).allowed, 3 / 256)
    # ten standard deviations are 0.01, and the cell of a value there is at most 2^-7 wider than it
    assert near(of_one(x, BFLOAT16).accepted, 3 / 256)
    assert near(of_one(x, BFLOAT16, limit=0.0).accepted, 2**-7)


def test_a_value_may_be_stored_more_precisely() -> None:
    """Then its own dtype rounds it, and the radius is the bound."""
    x = Enclosure(np.array([1.0]), np.array([2.0**-12]), np.array([2.0**-30]))
    assert of_one(x, BFLOAT16).allowed == of_one(x, BFLOAT16, FLOAT32).allowed >= 2**-12
    assert near(of_one(x, FLOAT32).allowed, 2**-12)


@pytest.mark.parametrize("part", [np.inf, np.nan])
def test_what_nothing_bounds_has_no_bound(part: float) -> None:
    x = Enclosure(np.array([1.0, 1.0]), np.array([0.0, part]), np.array([0.0, part]))
    assert of_one(x, FLOAT32) == Width(np.inf, np.inf)
    known = Enclosure(np.array([1.0]), np.array([np.inf]), np.array([1.0]))
    assert 10 <= of_one(known, FLOAT32).accepted < 11


def test_a_value_that_no_step_reads_does_not_count() -> None:
    x = Enclosure(np.array([1.0, 1.0]), np.array([0.0, 9.0]), np.array([0.0, 0.0]))
    assert width(x, [FLOAT32], np.array([True, False]), 10.0).allowed == 0


def test_the_total_is_the_distance_in_exact_fractions_and_the_certificate(made: Made) -> None:
    given = read_given(made.package)
    case = given.cases["one-pair"]
    mine, golden = load_file(made.package / TRACE), load_file(trace_path(case.folder))
    bounds = read_manifest(case.folder)["certificate"]["bounds"]
    totals = []
    for key in (key for key in mine if key.endswith("/logits")):
        pairs = zip(mine[key].reshape(-1).tolist(), golden[key].reshape(-1).tolist(), strict=True)
        totals.append(max(abs(Fraction(a) - Fraction(b)) for a, b in pairs) + Fraction(bounds[key]))
    document = json.loads((made.package / EPSILON).read_text())
    found = document["cases"]["one-pair"]["float32"]["steps"]["logits"]["total"]
    assert max(totals) <= Fraction(found) <= max(totals) * (1 + Fraction(1, 2**40))


def test_a_value_beyond_the_accepted_bound_is_not_conformant(made: Made, tmp_path: Path) -> None:
    """The same engine, but one logit is off by twice the bound."""
    given = read_given(made.package)
    outcome = given.results.outcomes[0]
    bound = judge_trace(given, outcome).bounds["logits"].accepted
    trace, arrays = read_trace(made.package / TRACE), load_file(made.package / TRACE)
    key = next(key for key in arrays if key.endswith("/logits"))
    arrays[key].reshape(-1)[0] += np.float32(2 * bound)
    (tmp_path / "traces").mkdir()
    (tmp_path / TRACE).write_bytes(trace_bytes(trace.header, arrays))
    moved = judge_trace(replace(given, folder=tmp_path), outcome)
    assert moved.outcome.verdict == NOT_CONFORMANT
    assert moved.outcome.first_wrong == tuple(key.split("/", 1))
    with pytest.raises(InputError, match="top-1"):
        judge_trace(replace(given, folder=tmp_path), given.results.outcomes[1])


def test_the_bound_from_the_tokens_holds_what_a_right_engine_reached(made: Made) -> None:
    document = json.loads((made.package / EPSILON).read_text())
    right = document["cases"]["one-pair"]["float32"]
    assert 0 < right["steps"]["logits"]["total"] < right["from_tokens"]["accepted"]
    wrong = document["cases"]["top-1"]["float32"]
    assert wrong["steps"]["logits"]["total"] > wrong["from_tokens"]["accepted"]
