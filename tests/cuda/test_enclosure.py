# SPDX-License-Identifier: Apache-2.0
"""The verifier's products on a device: the CPU's verdicts, and bounds that differ by no more than rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.matrices import Matrix
from refmoe.cuda.enclosure import DeviceMatrix, EnclosureCupyOps, Factor
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.model import Model
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import read_case
from refmoe.traces.script import execute
from refmoe.traces.trace import Header, Recorder, Trace, read_trace, write_trace
from refmoe.verifier.segments import Settings
from refmoe.verifier.verify import verify
from tests.cuda.strict import StrictCupy

GOLDEN = Path(__file__).parent.parent.parent / "golden"
CASE = read_case(GOLDEN / "walking-skeleton")


def on_device(used: Policy, tap: Any = None) -> EnclosureCupyOps:
    return EnclosureCupyOps(used, tap, xp=StrictCupy(), device_bytes=1 << 30)


def ideal_trace(path: Path, name: str) -> Trace:
    recorder = Recorder()
    model = Model(CASE.config, CASE.checkpoint().parameters, CUT_STEPS)
    execute(PolicyOps(policy(name), recorder), model, CASE.runs(), recorder)
    write_trace(path, Header(CASE.runs(), CASE.name, None, name), recorder.arrays)
    return read_trace(path)


@pytest.mark.parametrize("name", ["hf-bfloat16", "float64", "mistral-bfloat16"])
def test_verdicts_are_those_of_the_cpu(tmp_path: Path, name: str) -> None:
    trace, used = ideal_trace(tmp_path / "trace", name), policy(name)
    judged = [
        verify(trace, "case", CASE.config, CASE.checkpoint().parameters, CASE.runs(), used, Settings(ops=ops))
        for ops in (EnclosureOps, on_device)
    ]
    there, here = ([(c.run, c.tap, c.verdict, c.values, c.undecided) for c in report.checks] for report in judged)
    assert there == here
    assert judged[0].verdict == judged[1].verdict


@pytest.mark.parametrize("name", ["hf-bfloat16", "float64"])
def test_a_linear_map_encloses_the_same(name: str) -> None:
    used, weight = policy(name), CASE.checkpoint().parameters.layers[0].wq
    x = np.random.default_rng(1).standard_normal((5, weight.shape[1]))
    for given in (Enclosure(x), Enclosure(x, np.abs(x) / 64, np.abs(x) / 128), Enclosure(x, np.full_like(x, np.inf))):
        a, b = (ops(used).linear(given, weight) for ops in (EnclosureOps, on_device))
        for part in ("mid", "r", "v"):
            expected, found = (np.broadcast_to(getattr(each, part), a.shape) for each in (a, b))
            some = np.isfinite(expected)
            assert np.array_equal(some, np.isfinite(found))
            apart = np.abs(found[some] - expected[some]).max(initial=0)
            assert apart <= 1e-9 * np.abs(expected[some]).max(initial=0)


def test_a_matrix_on_the_device_answers_as_one_on_the_host() -> None:
    xp, values = StrictCupy(), np.array([[1.0, -2.0, 0.0], [2.0**-140, 3.0, 0.0]])
    held, other = policy("hf-bfloat16").at("weights"), policy("float64").at("weights")
    host, there = Matrix(Enclosure(values), held), DeviceMatrix(values, held, xp)
    x = np.array([[[1.0, 4.0]], [[0.5, -1.0]]])
    for part in ("mid", "size", "square", "signs"):
        assert np.array_equal(x @ getattr(host, part), x @ getattr(there, part)), part
    assert there.fits(held)
    assert there.fits(other) == host.fits(other)
    assert there.below(2.0**-150) is None
    below = there.below(2.0**-126)
    assert isinstance(below, Factor)
    assert np.array_equal(x @ below, x @ host.below(2.0**-126))
    assert below.max(initial=0.0) == 2.0**-140
    assert there.lacking(2.0**-150) is None
    assert np.array_equal(x @ there.lacking(2.0**-126), x @ host.lacking(2.0**-126))
    assert there.size[..., :1, :].max(initial=5.0) == 5.0
