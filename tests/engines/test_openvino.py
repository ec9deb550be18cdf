# SPDX-License-Identifier: Apache-2.0
"""The adapter of OpenVINO, where it is installed, and its error where it is not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from refmoe.engines.adapters import openvino
from refmoe.engines.results import read_results
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from tests.command_line import Refmoe

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("name", openvino.POLICIES.values())
def test_in_each_precision_experts_are_chosen_by_probabilities(name: str) -> None:
    """As in transformers, whose graph it is. In `router-underflow` a healthy engine would else be accused."""
    assert policy(name).router_order == policy("hf-float32").router_order


@pytest.mark.skipif(find_spec("openvino") is not None, reason="OpenVINO is installed here")
def test_without_the_package_the_command_is_named() -> None:
    with pytest.raises(InputError, match="refmoe engines openvino --install DIR"):
        openvino.Adapter()


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_it_is_conformant_in_the_precision_that_is_asked_for(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("conform", "--adapter", "openvino", "--golden", GOLDEN, "--case", "walking-skeleton", "--out", out)
    status, said, err = refmoe(*arguments)
    assert status == 0, said + err
    assert read_results(out).counts == {"conformant": 1}
