# SPDX-License-Identifier: Apache-2.0
"""The grouped statement of attention and experts has the bits of the spec, in exact arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.spec.model import Model
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.suite import find_cases, read_case, trace_path
from refmoe.traces.script import execute
from refmoe.traces.trace import Recorder, read_trace

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = [folder for folder in find_cases(GOLDEN) if read_case(folder).store == "trace"]


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_every_tap_of_every_case_has_the_golden_bits(folder: Path) -> None:
    """ATTN-1 to ATTN-5 and EXPERT-3: the goldens are written by the spec's own loops."""
    case, recorder = read_case(folder), Recorder()
    model = Model(case.config, case.checkpoint().parameters, GROUPED_STEPS)
    execute(ExactOps(recorder), model, case.runs(), recorder)
    golden = read_trace(trace_path(folder))
    assert recorder.arrays.keys() == golden.tensors.keys()
    for key, tensor in golden.tensors.items():
        assert np.array_equal(recorder.arrays[key], tensor.map()), key
