# SPDX-License-Identifier: Apache-2.0
"""Assertions for tests of engines and kernels, and a fixture over the cases.

>>> import refmoe
>>> model = refmoe.load("walking-skeleton")
>>> values = model.run([1, 31, 41], dtype="float32")
>>> refmoe.testing.assert_conformant(values, model, policy="float32")

The fixture `refmoe_case` of pytest gives each case in turn, or those that a marker names:

    import pytest, refmoe

    @pytest.mark.refmoe_cases("walking-skeleton", "top-1")
    def test_my_engine(refmoe_case, tmp_path):
        refmoe_case.model.save(tmp_path, dtype="float32")
        values = MyEngine(tmp_path).run(refmoe_case.runs)
        refmoe.testing.assert_conformant(values, refmoe_case, policy="float32")

A kernel by itself is judged from its own inputs and output, without `atol` and `rtol`:

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> x, w = rng.standard_normal((4, 64), np.float32), rng.standard_normal((8, 64), np.float32)
>>> bool(refmoe.testing.assert_linear(x @ w.T, x, w))
True
"""

from refmoe.testing.activation import assert_swiglu
from refmoe.testing.attention import assert_attention
from refmoe.testing.conformance import assert_conformant
from refmoe.testing.contracts import attention_contract, moe_contract, plan_contract
from refmoe.testing.judgement import Judgement
from refmoe.testing.mixture import assert_combine, assert_moe
from refmoe.testing.norm import assert_rms_norm
from refmoe.testing.plans import assert_permutation, assert_unpermutation
from refmoe.testing.products import assert_grouped_linear, assert_linear
from refmoe.testing.rotation import assert_rotary
from refmoe.testing.routing import assert_router
from refmoe.testing.tensor_core import assert_tensor_core_linear

__all__ = [
    "Judgement", "assert_attention", "assert_combine", "assert_conformant", "assert_grouped_linear", "assert_linear",
    "assert_moe", "assert_permutation", "assert_rms_norm", "assert_rotary", "assert_router", "assert_swiglu",
    "assert_tensor_core_linear", "assert_unpermutation", "attention_contract", "moe_contract", "plan_contract",
]  # fmt: skip
