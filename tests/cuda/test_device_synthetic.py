# SPDX-License-Identifier: Apache-2.0
"""The weight formula on a device: the host's bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.checkpoints import weight_formula
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.cuda import synthetic
from refmoe.cuda.synthetic import elements, on_device
from tests.cuda.strict import DeviceArray, StrictCupy
from tests.models import SMALL


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("seed", "exponent"), [(0, 0), (2**64 - 1, -14), (7, 120), (7, -126)])
def test_elements_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, count: int, seed: int, exponent: int
) -> None:
    monkeypatch.setattr(synthetic, "BLOCK", 64)
    found = elements(StrictCupy(), seed, "layers.0.attention.wq", exponent, count).get()
    expected = weight_formula.elements(seed, "layers.0.attention.wq", exponent, 0, count)
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_parameter_is_the_hosts(dtype: Any) -> None:
    """Matrices and gains, with and without edits."""
    edits = [{"parameter": "layers.0.attention.wk", "row": 0, "value": 2.0}]
    checkpoint = synthetic_checkpoint(SMALL, 3, edits=edits)
    here = named_weights(checkpoint.parameters)
    there = named_weights(on_device(SMALL, checkpoint.parameters, StrictCupy(), np.dtype(dtype).name))
    assert here.keys() == there.keys()
    for name, weight in there.items():
        values = weight.read()
        assert isinstance(values, DeviceArray)
        assert values.dtype == dtype
        assert np.array_equal(values.get().astype(np.float32), here[name].read()), name
    assert np.array_equal(there["embedding"].rows(np.array([3, 1])), here["embedding"].rows(np.array([3, 1])))
