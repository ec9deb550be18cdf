# SPDX-License-Identifier: Apache-2.0
"""Kernels that people run pass, in every dtype that they have, and fail once one row is another expert's."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from bench.real_kernels import DTYPES, KERNELS, LAYERS, Kernel, Shape, measured, product, torch_grouped
from refmoe.testing.products import judge_grouped_linear
from tests.cuda.runner.compile import missing_compiler

SMALL = Shape("small", tokens=37, inputs=64, hidden=48, experts=4)
ENGINES = ("torch", "transformers")


def runnable(kernel: Kernel) -> Any:
    marks: list[Any] = []
    absent = find_spec(kernel.needs.partition(".")[0]) is None
    marks.append(pytest.mark.skipif(absent, reason=f"{kernel.needs} is not installed"))
    if kernel.needs in ENGINES:
        marks.append(pytest.mark.engines)
    if kernel.name.startswith("inductor"):
        marks.append(pytest.mark.slow)
    if kernel.needs.startswith("tests.cuda"):
        marks.append(pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())))
    return pytest.param(kernel, marks=marks, id=kernel.name)


@pytest.mark.parametrize("kernel", [runnable(kernel) for kernel in KERNELS])
def test_a_kernel_that_people_run_passes_in_each_of_its_dtypes(kernel: Kernel) -> None:
    shape = replace(SMALL, slots=2) if kernel.shapes is LAYERS else SMALL
    for dtype in kernel.dtypes:
        row = measured(kernel, dtype, shape)
        assert row["verdict"] == "pass", row
        assert row["values"] == shape.tokens * (shape.inputs if kernel.shapes is LAYERS else shape.hidden)


@pytest.mark.engines
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_of_another_expert_is_seen(dtype: str) -> None:
    if find_spec("torch") is None:
        pytest.skip("torch is not installed")
    inputs = product(SMALL, DTYPES[dtype])
    found = torch_grouped(inputs)
    assert judge_grouped_linear(found, inputs.x, inputs.w, ids=inputs.experts)
    moved = inputs.experts.copy()
    moved[5] = (moved[5] + 1) % 4
    judgement = judge_grouped_linear(found, inputs.x, inputs.w, ids=moved)
    assert judgement.verdict == "fail"
    assert judgement.worst is not None
    assert judgement.worst.where[0] == 5
