# SPDX-License-Identifier: Apache-2.0
"""The spec against `transformers.MixtralForCausalLM`, an independent engine, tap by tap.

transformers computes norms, rotary tables, eager softmax and the router's softmax in float32 even in a float64
model. Unchanged, it agrees to float32's unit roundoff. With these steps lifted to float64, it must agree to float64's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.load import load_checkpoint
from refmoe.engines.capture.names import HUGGING_FACE
from refmoe.spec.model import Model
from refmoe.traces.script import Call, Packed, execute, plan
from refmoe.traces.trace import Recorder, Run
from tests.models import SMALL, relative_rms

pytestmark = pytest.mark.engines

CALLS = [
    ("prefill", 0, [3, 14, 15, 9, 26, 5, 35, 8, 9]), ("chunk", 0, [7, 9, 32]), ("decode", 0, [3, 8]),
]  # fmt: skip
NEVER_SEEN = {"attention.scores"}  # no module's value


def save_tiny_mixtral(folder: Path, seed: int = 1, **overrides: Any) -> None:
    """A random Mixtral as transformers makes and saves it: random gains, unit embeddings, theta not the default."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    c = SMALL
    config = MixtralConfig(**{
        "hidden_size": c.dim, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "intermediate_size": c.hidden_dim,
        "vocab_size": c.vocab, "num_local_experts": c.experts, "num_experts_per_tok": c.experts_per_token,
        "rms_norm_eps": c.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "max_position_embeddings": 512, **overrides,
    })  # fmt: skip
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=1.7 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_mixtral(folder)
    return folder


@pytest.fixture
def _lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers with every step that is hard-wired to float32 computed in float64."""
    import torch
    from transformers.models.mixtral import modeling_mixtral as m

    def norm(self: Any, x: Any) -> Any:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def table(self: Any, x: Any, position_ids: Any) -> Any:
        d = 2 * len(self.inv_freq)
        frequency = self.config.rope_parameters["rope_theta"] ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = position_ids[..., None].double() * frequency
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (m.repeat_kv(x, module.num_key_value_groups) for x in (k, v))
        scores = q @ k.transpose(2, 3) * scaling
        probs = torch.softmax(scores if mask is None else scores + mask, -1)
        return (probs @ v).transpose(1, 2).contiguous(), probs

    def router(self: Any, x: Any) -> Any:
        logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
        top, ids = torch.topk(torch.softmax(logits, -1), self.top_k, -1)
        return logits, top / top.sum(-1, keepdim=True), ids

    monkeypatch.setattr(m.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(m.MixtralRotaryEmbedding, "forward", table)
    monkeypatch.setattr(m, "eager_attention_forward", attend)
    monkeypatch.setattr(m.MixtralTopKRouter, "forward", router)


def both(folder: Path, dtype: str, attention: str = "eager", calls: Any = CALLS, kind: Any = None) -> Any:
    """The taps of the engine and the taps of the spec."""
    from refmoe.engines.capture.transformers import capture, load_model

    loaded = load_checkpoint(folder)
    runs = plan(calls, loaded.config.vocab)
    found, expected = Recorder(), Recorder()
    capture(load_model(folder, dtype, attention), runs, found)
    ops = kind(expected) if kind else NativeOps(np.float64, expected)
    execute(ops, Model(loaded.config, loaded.parameters), runs, expected)
    return found.arrays, expected.arrays


def assert_close(found: dict[str, Any], expected: dict[str, Any], bound: float, unseen: set[str]) -> None:
    """Every run has every tap except `unseen`, within the bound."""
    missing = {
        key.partition("/")[2].partition("layers.")[2].partition(".")[2] for key in expected.keys() - found.keys()
    }
    assert missing == unseen
    assert not found.keys() - expected.keys()
    for key, value in found.items():
        if key.endswith("experts"):
            assert np.array_equal(value, expected[key]), key
        else:
            assert relative_rms(value, expected[key]) < bound, key


@pytest.mark.usefixtures("_lifted")
@pytest.mark.parametrize("kind", [None, ExactOps])
def test_agrees_in_float64_to_float64_s_own_error(checkpoint: Path, kind: Any) -> None:
    """Prefill, chunk and decode, every tap a hook can see, better than 1e-14."""
    found, expected = both(checkpoint, "float64", kind=kind)
    assert {key.split("/")[0] for key in found} == {"prefill", "chunk1", "decode1", "decode2"}
    assert_close(found, expected, 1e-14, NEVER_SEEN)


@pytest.mark.usefixtures("_lifted")
def test_a_cut_cache_and_packed_segments_are_what_the_spec_says(checkpoint: Path) -> None:
    """A second request on the prefix of the first, and the segments of a packed call, each by itself."""
    calls = [
        ("prefill", 0, [3, 14, 15, 9, 26, 5]), ("decode", 0, [7]), Call("chunk", 0, [9, 32], keep=4),
        Packed([[4, 5, 6], [7, 8]]), Call("decode", 0, [1, 2], keep=5),
    ]  # fmt: skip
    found, expected = both(checkpoint, "float64", calls=calls)
    assert {key.split("/")[0] for key in found} >= {"chunk1", "packed.seg0", "packed.seg1", "decode3"}
    assert_close(found, expected, 1e-14, NEVER_SEEN)


@pytest.mark.usefixtures("_lifted")
def test_agrees_with_a_sliding_window(tmp_path: Path) -> None:
    """A window of 4: hidden within the prefill, in the chunk and in decoding."""
    save_tiny_mixtral(tmp_path, sliding_window=4)
    found, expected = both(tmp_path, "float64")
    assert load_checkpoint(tmp_path).config.window == 4
    assert_close(found, expected, 1e-14, NEVER_SEEN)


@pytest.mark.usefixtures("_lifted")
@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": 32, "head_dim": None, "num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_key_value_heads": 6}, {"num_key_value_heads": 1},
        {"num_experts_per_tok": 1}, {"num_experts_per_tok": 5}, {"num_local_experts": 11, "num_experts_per_tok": 3},
    ],
)  # fmt: skip
def test_agrees_for_other_shapes(tmp_path: Path, overrides: dict[str, Any]) -> None:
    save_tiny_mixtral(tmp_path, **overrides)
    found, expected = both(tmp_path, "float64")
    assert_close(found, expected, 1e-14, NEVER_SEEN)


@pytest.mark.parametrize(
    ("dtype", "attention", "bound"),
    [("float64", "eager", 1e-6), ("float32", "eager", 3e-6), ("float32", "sdpa", 3e-6), ("float64", "sdpa", 1e-6)],
)
def test_agrees_as_it_is_to_float32_s_error(checkpoint: Path, dtype: str, attention: str, bound: float) -> None:
    """2^-24 is 6e-8; two layers of a dozen steps amplify it about tenfold, and a mistake shows at 1e-2."""
    found, expected = both(checkpoint, dtype, attention)
    assert_close(found, expected, bound, NEVER_SEEN | ({"attention.probs"} if attention == "sdpa" else set()))


def test_two_sequences_with_a_cache_each(checkpoint: Path) -> None:
    calls = [("prefill", 0, [1, 2, 3]), ("prefill", 1, [4, 5]), ("decode", 0, [6]), ("decode", 1, [7])]
    found, expected = both(checkpoint, "float32", calls=calls)
    assert_close(found, expected, 3e-6, NEVER_SEEN)


def test_a_mistake_in_the_engine_is_seen_where_it_is(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation turned the other way: the first tap to differ is the rotated query."""
    from transformers.models.mixtral import modeling_mixtral as m

    turned = m.apply_rotary_pos_emb
    monkeypatch.setattr(m, "apply_rotary_pos_emb", lambda q, k, cos, sin: turned(q, k, cos, -sin))
    found, expected = both(checkpoint, "float32")
    run = {key.removeprefix("prefill/"): key for key in found if key.startswith("prefill/")}
    far = [
        tap
        for tap, key in run.items()
        if not key.endswith("experts") and relative_rms(found[key], expected[key]) > 1e-2
    ]
    assert "layers.0.attention.q_rope" in far
    assert not {"embedding", "layers.0.attention_norm", "layers.0.attention.q", "layers.0.attention.k"} & set(far)


def test_hooks_are_gone_after_a_capture(checkpoint: Path) -> None:
    """A capture leaves the model and the library unchanged."""
    from transformers.models.mixtral import modeling_mixtral as m

    from refmoe.engines.capture.transformers import capture, load_model

    turned, model = m.apply_rotary_pos_emb, load_model(checkpoint, "float32")
    runs: tuple[Run, ...] = plan(CALLS, SMALL.vocab)
    capture(model, runs, Recorder())
    assert m.apply_rotary_pos_emb is turned
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_table_names_modules_that_exist(checkpoint: Path) -> None:
    """Otherwise the tap of a renamed module would be lost without an error."""
    from refmoe.engines.capture.transformers import load_model

    modules = dict(load_model(checkpoint, "float32").named_modules())
    for name in HUGGING_FACE:
        assert name.replace("{i}", "1").partition(":")[0] in modules
