# SPDX-License-Identifier: Apache-2.0
"""The tables of engines' names."""

from __future__ import annotations

import pytest

from refmoe.engines.capture.names import HUGGING_FACE, MISTRAL, tap_of
from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS


@pytest.mark.parametrize("table", [HUGGING_FACE, MISTRAL], ids=["hugging face", "mistral"])
def test_every_name_leads_to_a_tap_and_no_tap_has_two(table: dict[str, str]) -> None:
    assert set(table.values()) <= LAYER_TAPS.keys() | MODEL_TAPS.keys()
    assert len(set(table.values())) == len(table)
    for name, tap in table.items():
        in_layer = "{i}" in name
        assert (tap in LAYER_TAPS) == in_layer
        for i in (0, 31):
            assert tap_of(table, name.replace("{i}", str(i))) == (f"layers.{i}.{tap}" if in_layer else tap)


@pytest.mark.parametrize(
    "name",
    ["", "layers", "layers.x.mlp:out", "model.layers.3", "model.layers.3.mlp", "layers.3.attention.wz:out", "norm"],
)
def test_other_names_lead_nowhere(name: str) -> None:
    assert tap_of(HUGGING_FACE, name) is None
    assert tap_of(MISTRAL, name) is None


def test_names_of_real_modules() -> None:
    """Spelled out, as the engines' own sources have them."""
    assert tap_of(HUGGING_FACE, "model.layers.12.self_attn.q_proj:out") == "layers.12.attention.q"
    assert tap_of(HUGGING_FACE, "model.layers.0:out") == "layers.0.residual"
    assert tap_of(MISTRAL, "layers.7.feed_forward.gate:out") == "layers.7.router.logits"
    assert tap_of(MISTRAL, "tok_embeddings:out") == "embedding"
