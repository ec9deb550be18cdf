# SPDX-License-Identifier: Apache-2.0
"""The measured shapes through torch: transformers in bfloat16, a decoder that torch compiles, and row operations."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from bench.gpu_measure import CAPACITY, CUDA, STEPS, Bench
from bench.gpu_report import Result, combine_bytes, decode_bytes, gather_bytes, layers_that_fit
from refmoe.spec.config import Config


def torch_problem() -> str | None:
    """Why torch cannot be measured, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else f"torch {torch.__version__} has no CUDA device"


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The mean time of a call, after two calls to warm up."""
    import torch

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


@contextmanager
def room(bench: Bench) -> Iterator[Config]:
    """The measured configuration. Before and after, refmoe's and torch's unused memory is freed."""
    import torch

    bench.free()
    layers = bench.notes.get("layers") or layers_that_fit(bench.config, CUDA.free_memory())
    try:
        yield replace(bench.config, layers=layers)
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def compared(bench: Bench) -> list[Result]:
    """The measurements of torch, or one sentence where torch is missing."""
    problem = torch_problem()
    if problem:
        return [Result("torch, transformers", None, "", note=problem)]
    results = []
    for section in (row_operations, transformers_model, compiled_decoder):
        try:
            with room(bench) as config:
                results += section(bench, config)
        except Exception as error:  # the benchmark continues if another library cannot run something
            results.append(Result(section.__name__, None, "", note=f"{type(error).__name__}: {error}".splitlines()[0]))
    return results


def row_operations(bench: Bench, config: Config) -> list[Result]:
    """index_select and index_add on the tensors of the kernels' measurement. The goal is that refmoe is no slower."""
    import torch

    tokens, k, columns = bench.tokens, config.experts_per_token, config.dim
    order = torch.randperm(tokens * k, device="cuda")
    x = torch.ones(tokens, columns, dtype=torch.float16, device="cuda")
    outputs = torch.ones(tokens * k, columns, dtype=torch.float16, device="cuda")
    token, out = order // k, torch.zeros_like(x)
    moved, summed = gather_bytes(tokens, k, columns, 2), combine_bytes(tokens, k, columns, 2)
    select = moved / seconds(lambda: torch.index_select(x, 0, token), 10)
    add = summed / seconds(lambda: out.zero_().index_add_(0, token, outputs), 10)
    ours = [bench.notes.get(f"{name}_bytes_per_second") for name in ("gather", "combine")]
    return [
        Result("torch.index_select", select / 1e12, "TB/s", bench.of_copy(select)),
        Result("torch.index_add, unweighted", add / 1e12, "TB/s", bench.of_copy(add)),
        *(
            Result(f"{name} kernel over {other}", rate / theirs, "times its speed", share=None, goal=1)
            for name, rate, other, theirs in zip(
                ("gather", "combine"), ours, ("index_select", "index_add"), (select, add), strict=True
            )
            if rate is not None
        ),
    ]


def transformers_model(bench: Bench, config: Config) -> list[Result]:
    """Decode and prefill in bfloat16. Weights are random, as only the time is measured."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    theirs = MixtralConfig(
        vocab_size=config.vocab, hidden_size=config.dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim, num_local_experts=config.experts, num_experts_per_tok=config.experts_per_token,
        max_position_embeddings=CAPACITY, use_cache=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(theirs).to(torch.bfloat16)
    model = model.to_empty(device="cuda").eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.uniform_(-0.01, 0.01)
        for buffer in model.buffers():
            buffer.zero_()
        prompt = torch.randint(0, config.vocab, (1, bench.prompt), device="cuda")
        cache = model(prompt[:, :8]).past_key_values
        state = {"cache": cache, "token": prompt[:, :1]}

        def step() -> None:
            found = model(state["token"], past_key_values=state["cache"])
            state["cache"], state["token"] = found.past_key_values, found.logits[:, -1:].argmax(-1)

        decode, prefill = seconds(step, STEPS), seconds(lambda: model(prompt), 3)
    ours, read = bench.notes.get("decode_seconds_graph"), bench.notes.get("prefill_seconds")
    results = [
        Result(
            "transformers decode, batch 1", 1 / decode, "tokens/s", bench.of_copy(decode_bytes(config, 64) / decode),
            note=f"{config.layers} layers",
        ),
        Result(f"transformers prefill, {bench.prompt} tokens", prefill * 1e3, "ms"),
    ]  # fmt: skip
    if ours:
        results.append(Result("refmoe over transformers, decode", decode / ours, "times its speed", share=None, goal=3))
    if read:
        results.append(Result("refmoe over transformers, prefill", prefill / read, "times its speed"))
    return results


def compiled_decoder(bench: Bench, config: Config) -> list[Result]:
    """A short compiled decoder, which gathers the experts' weights by their ids as gpt-fast's mixtral-moe does."""
    import torch

    step = torch.compile(decoder_step(config), mode="reduce-overhead", fullgraph=True)
    token = torch.zeros(1, dtype=torch.long, device="cuda")
    position = torch.full((1,), 8, dtype=torch.long, device="cuda")
    with torch.inference_mode():
        taken = seconds(lambda: step(token, position), STEPS)
    ours = bench.notes.get("decode_seconds_graph")
    note = f"{config.layers} layers, mode reduce-overhead"
    share = bench.of_copy(decode_bytes(config, 256, cache_size=2) / taken)
    results = [Result("torch.compile decode, batch 1", 1 / taken, "tokens/s", share, note=note)]
    if ours:
        results.append(Result("refmoe over torch.compile, decode", taken / ours, "times its speed"))
    return results


def decoder_step(config: Config, capacity: int = 256, device: str = "cuda", dtype: Any = None) -> Any:
    """A module: a token [1] and its position [1] to logits [V], with random weights and a static cache."""
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

    dtype = torch.bfloat16 if dtype is None else dtype
    names = ("dim", "hidden_dim", "experts", "heads", "kv_heads", "head_dim")
    dim, hidden, experts, heads, kv_heads, head_dim = (asdict(config)[name] for name in names)
    shapes = {
        "qkv": ((heads + 2 * kv_heads) * head_dim, dim), "wo": (dim, heads * head_dim), "gate": (experts, dim),
        "w1": (experts, hidden, dim), "w3": (experts, hidden, dim), "w2": (experts, dim, hidden), "norms": (2, dim),
        "k": (1, kv_heads, capacity, head_dim), "v": (1, kv_heads, capacity, head_dim),
    }  # fmt: skip

    def random(*shape: int) -> Any:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1).mul_(1 / math.sqrt(shape[-1]))

    class Decoder(torch.nn.Module):
        """A decoder whose tensors are all buffers, because CUDA graphs assume that buffers do not move."""

        def __init__(self) -> None:
            super().__init__()
            for i in range(config.layers):
                for name, shape in shapes.items():
                    self.register_buffer(f"{name}_{i}", random(*shape))
            self.register_buffer("embedding", random(config.vocab, dim))
            self.register_buffer("output", random(config.vocab, dim))
            self.register_buffer("norm", random(dim))
            powers = config.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
            angles = torch.arange(capacity)[:, None] * powers
            self.register_buffer("cosine", angles.cos().to(device, dtype))
            self.register_buffer("sine", angles.sin().to(device, dtype))
            self.register_buffer("slots", torch.arange(capacity, device=device))

        def turned(self, x: Any, position: Any) -> Any:
            a, b = x.chunk(2, dim=-1)
            c, s = self.cosine[position], self.sine[position]
            return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

        def forward(self, token: Any, position: Any) -> Any:
            x = self.embedding[token]
            for i in range(config.layers):
                part = {name: getattr(self, f"{name}_{i}") for name in shapes}
                x = x + self.attended(part, rms_norm(x, (dim,), part["norms"][0], config.norm_eps), position)
                x = x + self.mixed(part, rms_norm(x, (dim,), part["norms"][1], config.norm_eps))
            return linear(rms_norm(x, (dim,), self.norm, config.norm_eps), self.output)[0]

        def attended(self, part: Any, x: Any, position: Any) -> Any:
            q, k, v = linear(x, part["qkv"]).split([heads * head_dim, *[kv_heads * head_dim] * 2], dim=-1)
            part["k"][:, :, position] = self.turned(k.view(1, kv_heads, 1, head_dim), position)
            part["v"][:, :, position] = v.view(1, kv_heads, 1, head_dim)
            rows, mask = (
                self.turned(q.view(1, heads, 1, head_dim), position),
                (self.slots <= position)[None, None, None],
            )
            out = scaled_dot_product_attention(rows, part["k"], part["v"], mask, enable_gqa=True)
            return linear(out.reshape(1, heads * head_dim), part["wo"])

        def mixed(self, part: Any, x: Any) -> Any:
            weights, chosen = linear(x, part["gate"]).topk(config.experts_per_token, dim=-1)
            weights = weights.softmax(dim=-1, dtype=torch.float32).to(dtype)
            gate = torch.einsum("td,tkfd->tkf", x, part["w1"][chosen])
            up = torch.einsum("td,tkfd->tkf", x, part["w3"][chosen])
            out = torch.einsum("tkf,tkdf->tkd", silu(gate) * up, part["w2"][chosen])
            return (out * weights[..., None]).sum(1)

    return Decoder().eval()
