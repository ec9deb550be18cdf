# SPDX-License-Identifier: Apache-2.0
"""Configurations: what is refused, and what the published sizes amount to."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest

from refmoe.checkpoints.configuration import REAL, ConfigError, checked
from refmoe.checkpoints.names import parameter_shapes
from refmoe.checkpoints.size import active_parameters, total_parameters
from refmoe.spec.config import PRESETS, Config
from tests.models import SMALL

BAD: dict[str, Any] = {
    "dim": [0, -1, 1.0, "8", None, True],
    "layers": [0],
    "heads": [0, 7],
    "kv_heads": [0, 4, 12],
    "head_dim": [0, 7],
    "hidden_dim": [0],
    "vocab": [0],
    "experts": [0, 1],
    "experts_per_token": [0, 6],
    "norm_eps": [-1e-5, float("nan"), float("inf"), "1e-5", None],
    "rope_theta": [0, -1.0, 1e-3, 1e300, float("nan"), None],
    "window": [0, -4, 2.0],
    "context": [0],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_with_its_field_and_itself(field: str, value: Any) -> None:
    """CONFIG-1 to CONFIG-5."""
    with pytest.raises(ConfigError) as caught:
        checked({**asdict(SMALL), field: value})
    assert str(value) in str(caught.value) or f"{value:g}" in str(caught.value)
    assert field in str(caught.value) or field in ("heads", "experts")


@pytest.mark.parametrize("value", [10**9 + 8, 2**62, 2**70])
@pytest.mark.parametrize("field", [f.name for f in fields(Config) if f.name not in REAL])
def test_a_size_beyond_any_model_is_refused(field: str, value: int) -> None:
    """Before a list of that many weights is made."""
    if field not in ("window", "context") or value > 2**40:
        with pytest.raises(ConfigError, match=r"at most|exceeds|does not divide"):
            checked({**asdict(SMALL), field: value})


def test_many_layers_of_many_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers = 4096 times experts = 4096"):
        checked({**asdict(SMALL), "layers": 4096, "experts": 4096})


def test_the_published_sizes_have_the_published_parameters() -> None:
    """46.7 B and 12.9 B: Jiang et al. 2024, section 1; 8x22B: 141 B and 39 B, Mistral's announcement."""
    small, large = PRESETS["mixtral-8x7b"], PRESETS["mixtral-8x22b"]
    assert round(total_parameters(small) / 1e9, 1) == 46.7
    assert round(active_parameters(small) / 1e9, 1) == 12.9
    assert round(total_parameters(large) / 1e9) == 141
    assert round(active_parameters(large) / 1e9) == 39


def test_a_model_that_uses_all_experts_uses_all_parameters() -> None:
    """The two counts meet where k = E."""
    dense = Config(**{**asdict(SMALL), "experts_per_token": SMALL.experts})
    assert active_parameters(dense) == total_parameters(dense)
    assert len(parameter_shapes(SMALL)) == 3 + SMALL.layers * (7 + 3 * SMALL.experts)
