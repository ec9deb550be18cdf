# SPDX-License-Identifier: Apache-2.0
"""The adapter of mistral-inference: its attention, which replaces a kernel, and the engine where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from refmoe.engines.adapters import mistral_inference
from refmoe.engines.capture.shapes import half_split, put_rows
from refmoe.engines.results import read_results
from refmoe.errors import InputError
from tests.command_line import Refmoe

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.engines
def test_the_attention_in_place_of_the_kernel_is_attention() -> None:
    """Against its definition in float64. Cells of the cache that every row hides hold NaN, as unused memory may."""
    import torch

    random = np.random.default_rng(5)
    q, k, v = (random.normal(size=(1, length, 2, 4)) for length in (3, 5, 5))
    shown = np.tril(np.ones((3, 5)), 1)
    scores = np.einsum("thd,shd->hts", q[0], k[0]) / 2
    weights = np.exp(scores) * shown
    expected = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v[0])
    k[:, 4], v[:, 4] = np.nan, np.nan
    bias = SimpleNamespace(materialize=lambda *_, **__: torch.log(torch.tensor(shown)))
    found = mistral_inference.attention(torch, torch.tensor(q), torch.tensor(k), torch.tensor(v), bias)
    np.testing.assert_allclose(found.numpy()[0], expected, rtol=1e-6)


def test_pairs_are_told_apart() -> None:
    """Interleaved pairs (0, 1), (2, 3) become halves (0, 2), (1, 3)."""
    assert half_split(np.arange(4)[None, None]).tolist() == [[[0, 2, 1, 3]]]


def test_rows_of_an_expert_go_where_it_was_chosen() -> None:
    """Expert 0 is the second choice of token 0, and the first of token 1."""
    slots = {"expert.up": np.zeros((2, 2, 1))}
    for step in ("expert.up", "expert.gate"):
        put_rows(slots, step, np.array([[5.0], [6.0]]), np.array([[1, 0], [0, 2]]), 0)
        assert slots[step][:, :, 0].tolist() == [[0, 5], [6, 0]]


@pytest.mark.skipif(find_spec("mistral_inference") is not None, reason="mistral-inference is installed here")
def test_without_the_package_the_command_is_named() -> None:
    with pytest.raises(InputError, match="refmoe engines mistral_inference --install DIR"):
        mistral_inference.Adapter()


@pytest.mark.skipif(find_spec("mistral_inference") is None, reason="mistral-inference is not installed")
def test_it_is_conformant(refmoe: Refmoe, tmp_path: Path) -> None:
    cases = [word for case in ("batch-ragged", "shared-prefix", "window-chunks") for word in ("--case", case)]
    out = tmp_path / "out.json"
    status, said, err = refmoe("conform", "--adapter", "mistral_inference", "--golden", GOLDEN, *cases, "--out", out)
    assert status == 0, said + err
    assert read_results(out).counts == {"conformant": 12}
