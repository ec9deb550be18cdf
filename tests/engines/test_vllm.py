# SPDX-License-Identifier: Apache-2.0
"""vLLM's adapter, held to a stand-in, because the engine takes gigabytes. bench/results/conform has runs of it.

The stand-in has the modules, names, fused parameters and writes in place of vLLM's
vllm/model_executor/models/mixtral.py, and float32 arithmetic of its own. It samples greedily, as the engine does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.adapter import Skipped
from refmoe.engines.adapters import vllm
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.spec.taps import step_of
from refmoe.suite import read_case
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.findings import CONFORMANT
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"
pytestmark = pytest.mark.engines


def fake_mixtral(config: Config, weights: dict[str, np.ndarray[Any, Any]]) -> Any:
    """A `MixtralForCausalLM` as vLLM builds it; `forward` takes tokens and positions, and keeps its own cache."""
    import torch
    from torch import nn

    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    q_size, kv_size, d = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.head_dim

    class Norm(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.gain = w[name]

        def normed(self, x: Any) -> Any:
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * self.gain

        def forward(self, x: Any, residual: Any = None) -> Any:
            if residual is None:
                return self.normed(x)
            residual += x  # as fused_add_rms_norm, which writes over both
            x.copy_(self.normed(residual))
            return x, residual

    class Linear(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.weight = torch.cat([w[name] for name in names])

        def forward(self, x: Any) -> Any:
            return x @ self.weight.T, None

    class Embedding(nn.Module):
        def forward(self, tokens: Any) -> Any:
            return w["embedding"][tokens]

    class Rope(nn.Module):
        def forward(self, positions: Any, q: Any, k: Any) -> Any:
            frequency = 1 / config.rope_theta ** (torch.arange(0, d, 2).float() / d)
            angle = (positions[:, None].float() * frequency)[:, None]
            for x in (q, k):  # in place, as vLLM's kernel
                a, b = (half.clone() for half in x.view(len(x), -1, d).chunk(2, -1))
                turned = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
                x.copy_(turned.flatten(1))
            return q, k

    rope = Rope()

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: Any = None

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            new = [x.reshape(len(x), -1, d).clone() for x in (k, v)]
            self.kept = [torch.cat(pair) for pair in zip(self.kept, new, strict=True)] if self.kept else new
            keys, values = (x.repeat_interleave(config.heads // config.kv_heads, 1) for x in self.kept)
            scores = torch.einsum("thd,shd->hts", q.reshape(len(q), -1, d), keys) * d**-0.5
            seen = torch.ones(len(keys), len(keys), dtype=torch.bool).tril()[-len(q) :]
            probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            return torch.einsum("hts,shd->thd", probs, values).flatten(1)

    class Attention(nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.q_size, self.kv_size, self.head_dim = q_size, kv_size, d
            self.qkv_proj = Linear(*(f"{prefix}attention.w{name}" for name in "qkv"))
            self.o_proj = Linear(f"{prefix}attention.wo")
            self.rotary_emb, self.attn = rope, Attend()

        def forward(self, positions: Any, hidden_states: Any) -> Any:
            qkv, _ = self.qkv_proj(hidden_states)
            q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
            q, k = self.rotary_emb(positions, q, k)
            return self.o_proj(self.attn(q, k, v))[0]

    class Experts(nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            every = [f"{prefix}experts.{e}." for e in range(config.experts)]
            self.w13_weight = torch.stack([torch.cat([w[f"{name}w1"], w[f"{name}w3"]]) for name in every])
            self.w2_weight = torch.stack([w[f"{name}w2"] for name in every])

        def forward(self, x: Any, router_logits: Any) -> Any:
            weights, chosen = router_logits.softmax(-1).topk(config.experts_per_token)
            weights = weights / weights.sum(-1, keepdim=True)
            gate, up = torch.einsum("td,tknd->tkn", x, self.w13_weight[chosen]).chunk(2, -1)
            out = torch.einsum("tkf,tkdf->tkd", nn.functional.silu(gate) * up, self.w2_weight[chosen])
            return (out * weights[..., None]).sum(1)

    class Moe(nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.gate, self.experts = Linear(f"{prefix}router.gate"), Experts(prefix)

        def forward(self, x: Any) -> Any:
            return self.experts(x, self.gate(x)[0])

    class Layer(nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.self_attn, self.block_sparse_moe = Attention(prefix), Moe(prefix)
            self.input_layernorm = Norm(f"{prefix}attention_norm")
            self.post_attention_layernorm = Norm(f"{prefix}moe_norm")

        def forward(self, positions: Any, x: Any, residual: Any) -> Any:
            if residual is None:
                residual, x = x, self.input_layernorm(x)
            else:
                x, residual = self.input_layernorm(x, residual)
            x = self.self_attn(positions=positions, hidden_states=x)
            x, residual = self.post_attention_layernorm(x, residual)
            return self.block_sparse_moe(x), residual

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.norm = Embedding(), Norm("final_norm")
            self.layers = nn.ModuleList([Layer(f"layers.{i}.") for i in range(config.layers)])

        def forward(self, tokens: Any, positions: Any) -> Any:
            x, residual = self.embed_tokens(tokens), None
            for layer in self.layers:
                x, residual = layer(positions, x, residual)
            return self.norm(x, residual)[0]

    class ForCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = Inner(), Linear("output")

        def forward(self, tokens: Any, positions: Any) -> Any:
            return self.model(tokens, positions)

        def compute_logits(self, x: Any) -> Any:
            return self.lm_head(x)[0]

    return ForCausalLM()


class FakeEngine:
    """The part of `LLMEngine` that the adapter uses: a step computes as many tokens as the scheduler allows."""

    def __init__(self, model: Any) -> None:
        scheduler = SimpleNamespace(max_num_scheduled_tokens=4096)
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
        self.model, self.tokens, self.past, self.left = model, list[int](), 0, 0

    def step(self) -> None:
        """Compute the next tokens, and sample one where the prompt is at its end."""
        import torch

        new = self.tokens[self.past :][: self.engine_core.engine_core.scheduler.max_num_scheduled_tokens]
        positions = torch.arange(self.past, self.past + len(new))
        logits = self.model.compute_logits(self.model(torch.tensor(new), positions)[-1:])
        self.past += len(new)
        if self.past == len(self.tokens):
            self.tokens.append(int(logits.argmax()))
            self.left -= 1


class FakeLLM:
    """The part of `vllm.LLM` that the adapter uses."""

    def __init__(self, model: str, dtype: str, **options: Any) -> None:
        loaded = load_checkpoint(Path(model))
        read = {name: np.asarray(weight.read()) for name, weight in named_weights(loaded.parameters).items()}
        self.model = fake_mixtral(loaded.config, {name: array.astype(dtype) for name, array in read.items()})
        self.options, self.llm_engine = options, FakeEngine(self.model)

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self.model)]

    def generate(self, prompt: dict[str, list[int]], sampling: Any, use_tqdm: bool) -> None:
        for layer in self.model.model.layers:
            layer.self_attn.attn.kept = None
        assert (sampling.temperature, sampling.ignore_eos) == (0.0, True)
        engine = self.llm_engine
        engine.tokens, engine.past, engine.left = [*prompt["prompt_token_ids"]], 0, sampling.max_tokens
        while engine.left:
            engine.step()


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> vllm.Adapter:
    package = ModuleType("vllm")
    cleared: list[bool] = []
    distributed = SimpleNamespace(cleanup_dist_env_and_memory=lambda: cleared.append(True))
    for name, value in {"LLM": FakeLLM, "SamplingParams": SimpleNamespace, "__version__": "0.33.0"}.items():
        monkeypatch.setattr(package, name, value, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    sizes = SimpleNamespace(get_supported_head_sizes=lambda: [4, 6, 8, 10, 16, 32])
    kernel = SimpleNamespace(CPUAttentionBackend=sizes)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.cpu_attn", kernel)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return vllm.Adapter()


CASES = ("mini-8x7b", "batch-ragged", "head-dim-free", "dims-distinct", "top-3", "dyadic", "one-shot-chunked-stepwise")


@pytest.mark.parametrize("name", CASES)
def test_every_tap_that_is_promised_is_what_its_name_says(name: str, adapter: vllm.Adapter, tmp_path: Path) -> None:
    """The stand-in's values are conformant under the adapter's names; a wrong name or split would fail."""
    case = read_case(GOLDEN / name)
    write_checkpoint(tmp_path / "model", case.config, case.checkpoint().parameters, dtype="float32")
    adapter.load(tmp_path / "model", "float32")
    arrays = adapter.run(case.runs(), adapter.taps)
    write_trace(tmp_path / "trace", Header(case.runs(), case.name, policy="hf-float32"), arrays)
    report = verify(
        read_trace(tmp_path / "trace"), name, case.config, case.checkpoint().parameters, case.runs(),
        policy("hf-float32"),
    )  # fmt: skip
    assert report.verdict == CONFORMANT, report.headline
    assert not report.unknown
    found = {(key.partition("/")[0], step_of(key.partition("/")[2])) for key in arrays}
    assert found == {(run.run, tap) for run in case.runs() for tap in adapter.taps}
    assert set(report.missing) == set(vllm.UNSEEN)


def test_the_engine_is_asked_for_no_graph_and_no_prefix_cache(adapter: vllm.Adapter, tmp_path: Path) -> None:
    case = read_case(GOLDEN / "dims-distinct")
    write_checkpoint(tmp_path / "model", case.config, case.checkpoint().parameters, dtype="float32")
    adapter.load(tmp_path / "model", "float32")
    assert adapter.llm.options == {
        "skip_tokenizer_init": True, "enforce_eager": True, "max_num_seqs": 1, "async_scheduling": False,
        "enable_prefix_caching": False, "enable_chunked_prefill": True, "kv_cache_dtype": "auto",
    }  # fmt: skip
    assert adapter.policies["float32"] == "float32"
    adapter.load(tmp_path / "model", "float32")  # in place of the first


@pytest.mark.parametrize("name", ["shared-prefix", "positions-256"])
def test_what_no_request_does_is_skipped(name: str, adapter: vllm.Adapter) -> None:
    with pytest.raises(Skipped, match="cuts the cache or starts elsewhere"):
        adapter.run(read_case(GOLDEN / name).runs(), adapter.taps)


def test_a_head_that_the_kernel_lacks_is_skipped(adapter: vllm.Adapter, tmp_path: Path) -> None:
    case = read_case(GOLDEN / "head-dim-64")
    write_checkpoint(tmp_path / "model", case.config, case.checkpoint().parameters, dtype="float32")
    with pytest.raises(Skipped, match=f"not of {case.config.head_dim}"):
        adapter.load(tmp_path / "model", "float32")


def test_it_can_be_imported_without_the_package() -> None:
    if "vllm" not in sys.modules:
        with pytest.raises(InputError, match="refmoe engines vllm --install DIR"):
            vllm.Adapter()
