# SPDX-License-Identifier: Apache-2.0
"""Fields of other models in config.json: refused if they change a model, read if they change nothing, else noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refmoe import load, verify
from refmoe.checkpoints.foreign_fields import FIELDS
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.errors import InputError
from tests.command_line import Refmoe
from tests.models import SMALL

CHANGING: dict[str, Any] = {
    "layer_types": ["full_attention", "linear_attention"], "norm_topk_prob": False, "scoring_func": "sigmoid",
    "num_shared_experts": 1, "logit_scale": 0.0625, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30,
    "clip_qkv": 8.0, "use_qk_norm": True, "residual_multiplier": 0.22, "embedding_multiplier": 12,
    "attention_multiplier": 0.5, "query_pre_attn_scalar": 256, "rope_type": "yarn", "partial_rotary_factor": True,
    "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 2,
    "num_experts": 64, "moe_intermediate_size": 17, "attention_bias": True, "router_bias": 1, "is_causal": False,
    "use_parallel_residual": True, "rms_norm_add_unit_offset": True, "rope_interleaved": True, "attention_sinks": True,
    "sliding_window_pattern": 4, "no_rope_layers": [1, 0], "hidden_activation": "gelu", "mlp_only_layers": [0],
    "rope_scaling": {"rope_type": "default", "factor": 2.0},
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "norm_topk_prob": True, "scoring_func": "softmax", "num_shared_experts": 0, "logit_scale": 1.0,
    "attn_logit_softcapping": None, "final_logit_softcapping": 0.0, "clip_qkv": None, "use_qk_norm": False,
    "residual_multiplier": 1, "attention_multiplier": SMALL.head_dim**-0.5, "query_pre_attn_scalar": SMALL.head_dim,
    "rope_type": "default", "partial_rotary_factor": 1.0, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0, "moe_layer_freq": 1, "num_experts": SMALL.experts, "attention_bias": False,
    "moe_intermediate_size": SMALL.hidden_dim, "rope_scaling": {"rope_type": "default"}, "is_causal": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, SMALL, synthetic_checkpoint(SMALL, 1).parameters)
    return folder


def with_fields(folder: Path, target: Path, fields: dict[str, Any]) -> Path:
    """A checkpoint with the same weights and more fields."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return target


@pytest.mark.parametrize("field", CHANGING)
def test_a_field_that_changes_the_model_is_refused(folder: Path, tmp_path: Path, field: str) -> None:
    changed = with_fields(folder, tmp_path / "m", {field: CHANGING[field], "sliding_window": 4})
    with pytest.raises(InputError, match=rf"config\.json: '{field}' is "):
        load_checkpoint(changed)


@pytest.mark.parametrize("field", NEUTRAL)
def test_a_value_that_changes_nothing_is_read(folder: Path, tmp_path: Path, field: str) -> None:
    assert load_checkpoint(with_fields(folder, tmp_path / "m", {field: NEUTRAL[field]})).unknown == ()


def test_every_field_refuses_something(folder: Path, tmp_path: Path) -> None:
    """No entry of the table lets every value pass; of a window that is not there, any pattern may be given."""
    for number, name in enumerate(FIELDS):
        changed = with_fields(folder, tmp_path / str(number), {name: {"strange": 7.5}, "sliding_window": 4})
        with pytest.raises(InputError, match=rf"config\.json: '{name}' is "):
            load_checkpoint(changed)


def test_layers_of_one_kind_are_read(folder: Path, tmp_path: Path) -> None:
    kinds = {None: "full_attention", 4: "sliding_attention"}
    for window, kind in kinds.items():
        fields = {"sliding_window": window, "layer_types": [kind] * SMALL.layers}
        assert load_checkpoint(with_fields(folder, tmp_path / kind, fields)).config.window == window


def test_an_unknown_field_is_noted(folder: Path, tmp_path: Path, refmoe: Refmoe) -> None:
    changed = with_fields(folder, tmp_path / "m", {"neuron": {"tp": 8}, "another\x1b[2J": 1, "nothing": None})
    assert load_checkpoint(changed).unknown == ("neuron", "another\x1b[2J")
    status, out, _ = refmoe("info", changed, "--json")
    assert (status, json.loads(out)["unknown_fields"]) == (0, ["neuron", "another\x1b[2J"])
    status, out, _ = refmoe("info", changed)
    assert (status, "neuron" in out, "\x1b" in out) == (0, True, False)
    model = load(changed)
    report = verify({"logits": model.run([1, 2], dtype="float32")["prefill", "logits"]}, model, [1, 2])
    assert any("'neuron'" in note for note in report.notes)
