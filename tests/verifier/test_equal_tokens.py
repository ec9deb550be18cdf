# SPDX-License-Identifier: Apache-2.0
"""Values that the trace does not have: equal tokens round alike, so their errors add up and do not cancel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.run_engine import run
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.suite import Case, read_case
from refmoe.traces.script import Call
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"


def behind(tokens: tuple[int, ...]) -> Case:
    """Two decode steps behind a prefix that is not recorded, in a model of one layer."""
    case = read_case(GOLDEN / "square")
    calls = (Call("prefill", 0, tokens, read=False), Call("decode", 0, (5, 9)))
    return replace(case, config=replace(case.config, layers=1), calls=calls)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("ids", [(3,), (3, 7)])
def test_a_healthy_engine_behind_many_equal_tokens_is_conformant(dtype: str, ids: tuple[int, ...]) -> None:
    """A thousand equal values that are rounded alike have one error, and not the mean of a thousand."""
    case, rules = behind(ids * (1000 // len(ids))), policy(dtype)
    parameters = case.checkpoint().parameters
    trace = run(None, case.config, parameters, case.runs(), rules)
    assert verify(trace, case.name, case.config, parameters, case.runs(), rules).verdict == CONFORMANT


def test_a_bug_behind_many_equal_tokens_is_seen() -> None:
    case, rules = behind((3, 7) * 500), policy("bfloat16")
    parameters = case.checkpoint().parameters
    trace = run(MUTANTS["rope-theta-default"], case.config, parameters, case.runs(), rules)
    assert verify(trace, case.name, case.config, parameters, case.runs(), rules).verdict == NOT_CONFORMANT


def test_the_variance_of_a_weighted_sum_of_equal_errors_is_covered() -> None:
    """Cauchy and Schwarz: with weights w of n equal errors of variance s, sum(w)^2 s is at most n sum(w^2) s."""
    ops = EnclosureOps(policy("bfloat16"))
    x = Enclosure(np.full((8, 1, 2), 1 / 3), np.full((8, 1, 2), 0.002), np.full((8, 1, 2), 1e-6))
    ops.repeats = np.full(8, 8)
    found = np.asarray(ops.remembered(x).v)[:, 0, 0]
    weights = np.random.default_rng(0).random(8)
    single = np.asarray(x.v).reshape(-1)[0]
    assert weights.sum() ** 2 * single <= (weights**2 * found).sum()
    ops.repeats = np.ones(8)
    assert ops.remembered(x) is x
