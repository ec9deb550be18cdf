# SPDX-License-Identifier: Apache-2.0
"""The experts of a few tokens, read in place: within the bounds of float32 sums, and equal bits in every order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.cuda.kernels.calls import Kernels
from tests.cuda.laws import expert_hidden_law, expert_output_law, products
from tests.cuda.on_cpu import DTYPES, in_every_order, module, needs_compiler, stored
from tests.cuda.runner.module import Conditions
from tests.cuda.test_rows import far_rows

pytestmark = needs_compiler
INPUTS = st.sampled_from([1, 3, 7, 8, 9, 33, 64, 100, 255, 256, 257, 264, 520, 1001])


@st.composite
def layers(draw: Any) -> tuple[Any, ...]:
    """w1, w3: [E, F, D]   x: [T, D]   chosen: [T, k]"""
    experts, outputs, inputs = draw(st.integers(1, 6)), draw(st.integers(1, 20)), draw(INPUTS)
    tokens, k = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    rng, dtype = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.sampled_from(sorted(DTYPES)))
    w1, w3 = (stored(rng, (experts, outputs, inputs), dtype) for _ in range(2))
    return w1, w3, stored(rng, (tokens, inputs), "float32"), rng.integers(0, experts, (tokens, k)).astype(np.int32)


@given(layers())
@settings(max_examples=20)
def test_hidden_is_gated_by_the_first_matrix(case: Any) -> None:
    """EXPERT-1 and EXPERT-2."""
    expert_hidden_law(in_every_order, *case)


@given(layers())
@settings(max_examples=20)
def test_output_is_each_slots_own_expert(case: Any) -> None:
    """EXPERT-1, of another row in each slot."""
    w2, _, x, chosen = case
    rows = np.random.default_rng(1).standard_normal((*chosen.shape, x.shape[1])).astype(np.float32)
    expert_output_law(in_every_order, w2, rows, chosen)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_small_integers_are_exact(dtype: str) -> None:
    """In any order, every element is used once, with its own partner."""
    rng = np.random.default_rng(2)
    w = rng.integers(-4, 5, (3, 9, 777)).astype(DTYPES[dtype])
    x, chosen = rng.integers(-4, 5, (2, 3, 777)).astype(np.float32), np.array([[2, 0, 1], [1, 1, 2]], np.int32)
    output = in_every_order(lambda kernels: kernels.expert_output(w, x, chosen))
    assert np.array_equal(output, products(w, x, chosen)[0])


def test_weights_beyond_2_to_the_31_elements_are_reached() -> None:
    """The second expert begins beyond that element, and only its first rows are computed."""
    w2 = far_rows(2 * 70_000, 1 << 15).reshape(2, 70_000, 1 << 15)
    w2[1, :8, ::1024] = 1
    hidden, chosen = np.ones((1, 1, 1 << 15), np.float32), np.ones((1, 1), np.int32)
    launched: list[Any] = []

    def few_rows(expression: str) -> Any:
        function = module("experts.cu").under(Conditions(guard=None))(expression)

        def launch(grid: Any, block: Any, arguments: Any) -> None:
            launched.append(grid)
            function((1, 1), block, arguments)

        return launch

    output = Kernels(np, lambda file: few_rows).expert_output(w2, hidden, chosen)
    assert output[0, 0, :8].tolist() == [32.0] * 8
    assert launched == [(8750, 1)]
