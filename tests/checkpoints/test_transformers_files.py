# SPDX-License-Identifier: Apache-2.0
"""Files exchanged with transformers: refmoe reads its files, and it reads refmoe's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from refmoe.checkpoints.layout import Checkpoint  # noqa: E402
from refmoe.checkpoints.load import load_checkpoint  # noqa: E402
from refmoe.checkpoints.synthetic import synthetic_checkpoint  # noqa: E402
from refmoe.checkpoints.write import write_checkpoint  # noqa: E402
from refmoe.spec.config import Config  # noqa: E402
from tests.checkpoints.models import DTYPES, UNEVEN, all_values, rename, take_apart  # noqa: E402

pytestmark = pytest.mark.engines

CONFIG = UNEVEN


def engine_config(config: Config) -> Any:
    return transformers.MixtralConfig(
        hidden_size=config.dim, num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.head_dim, intermediate_size=config.hidden_dim,
        vocab_size=config.vocab, num_local_experts=config.experts, num_experts_per_tok=config.experts_per_token,
        rms_norm_eps=config.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        sliding_window=config.window, max_position_embeddings=config.context,
    )  # fmt: skip


def engine_values(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The engine's parameters by the spec's names, read from its modules by a second, independent map."""
    found = {"embedding": model.model.embed_tokens.weight, "final_norm": model.model.norm.weight}
    found["output"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        prefix, hidden = f"layers.{i}.", layer.mlp.experts.gate_up_proj.shape[1] // 2
        found[prefix + "attention_norm"] = layer.input_layernorm.weight
        found[prefix + "moe_norm"] = layer.post_attention_layernorm.weight
        for name in "qkvo":
            found[f"{prefix}attention.w{name}"] = getattr(layer.self_attn, f"{name}_proj").weight
        found[prefix + "router.gate"] = layer.mlp.gate.weight
        for e in range(len(layer.mlp.experts.gate_up_proj)):
            found[f"{prefix}experts.{e}.w1"] = layer.mlp.experts.gate_up_proj[
                e, :hidden
            ]  # the gate, which goes through silu
            found[f"{prefix}experts.{e}.w3"] = layer.mlp.experts.gate_up_proj[e, hidden:]
            found[f"{prefix}experts.{e}.w2"] = layer.mlp.experts.down_proj[e]
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in model.parameters())
    return {name: value.detach().to(torch.float64).numpy() for name, value in found.items()}


def assert_equal(loaded: Checkpoint, model: Any) -> None:
    ours, theirs = all_values(loaded.parameters), engine_values(model)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert np.array_equal(ours[name], values), name


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(11)
    model = transformers.MixtralForCausalLM(engine_config(CONFIG))
    for parameter in model.parameters():  # norms begin as ones, which would hide that two are exchanged
        parameter.data.normal_(1.0, 0.3)
    return model.to(getattr(torch, request.param))


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("original", [True, False], ids=["published-names", "module-names"])
def test_what_transformers_writes_is_read(tmp_path: Path, model: Any, original: bool, shard: str) -> None:
    """Both with the names of published checkpoints (its default) and with those of its own modules."""
    model.save_pretrained(tmp_path, max_shard_size=shard, save_original_format=original)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == CONFIG
    assert loaded.dtypes == (DTYPES[str(model.dtype).removeprefix("torch.")],)
    assert (len(loaded.files) > 3) == (shard == "10KB")
    assert_equal(loaded, model)


@pytest.mark.parametrize("original", [True, False])
def test_the_names_that_transformers_writes(tmp_path: Path, model: Any, original: bool) -> None:
    """Experts are apart under block_sparse_moe, or fused under mlp. This test fails when transformers changes that."""
    model.save_pretrained(tmp_path, save_original_format=original)
    names = take_apart(tmp_path / "model.safetensors")[0].keys() - {"__metadata__"}
    experts = {name for name in names if "experts" in name}
    if original:
        assert "model.layers.1.block_sparse_moe.experts.4.w3.weight" in experts
        assert len(experts) == CONFIG.layers * CONFIG.experts * 3
    else:
        assert "model.layers.1.mlp.experts.gate_up_proj" in experts
        assert len(experts) == CONFIG.layers * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("rope_parameters", [False, True], ids=["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("experts", ["apart", "fused", "fused-mlp"])
def test_transformers_reads_what_is_written(
    tmp_path: Path, experts: str, rope_parameters: bool, shards: bool, dtype: str
) -> None:
    source = synthetic_checkpoint(CONFIG, seed=13)
    fused = experts != "apart"
    write_checkpoint(
        tmp_path, CONFIG, source.parameters, dtype, fused=fused, rope_parameters=rope_parameters, shards=shards
    )
    if experts == "fused-mlp":
        for path in tmp_path.glob("model*"):
            rename(path, ".block_sparse_moe.", ".mlp.")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is transformers.MixtralForCausalLM
    assert not any(info.values()), info
    assert model.dtype == getattr(torch, dtype)
    assert model.config.rope_parameters["rope_theta"] == CONFIG.rope_theta
    for ours, theirs in {"window": "sliding_window", "norm_eps": "rms_norm_eps", "head_dim": "head_dim"}.items():
        assert getattr(model.config, theirs) == getattr(CONFIG, ours)
    assert_equal(source, model)
