# SPDX-License-Identifier: Apache-2.0
"""vLLM's Mixtral, watched by forward hooks in the engine's own process.

This adapter never ran against the package. It is written from the source of vLLM 0.33.0 and uses its public names:
`LLM`, `LLM.apply_model`, and `trace_decode_token_ids` of `SamplingParams`, the tokens that decodes are fed. Tests hold
it to a stand-in with the same modules.

Scores and probabilities stay inside the attention kernel and are not seen. Gate, up, hidden and output of each expert
stay inside the fused kernel of `w13_weight` and `w2_weight`. The engine calls its `compute_logits` for the last token
alone; the adapter calls it for all tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.capture.names import tap_of
from refmoe.engines.capture.transformers import to_numpy
from refmoe.engines.protocol import TAPS
from refmoe.errors import require
from refmoe.traces.trace import Run

NAMES = {
    "model.embed_tokens:out0": "embedding",
    "model.layers.{i}.input_layernorm:out0": "attention_norm",
    "model.layers.{i}.self_attn.attn:out0": "attention.context",
    "model.layers.{i}.self_attn.o_proj:out0": "attention.output",
    "model.layers.{i}.post_attention_layernorm:out0": "moe_norm",
    "model.layers.{i}.post_attention_layernorm:out1": "attention_residual",  # a norm first adds, and returns both
    "model.layers.{i}.block_sparse_moe.gate:out0": "router.logits",
    "model.layers.{i}.block_sparse_moe:out0": "moe.output",
    "model.norm:out0": "final_norm",
}
"""Names of vllm/model_executor/models/mixtral.py to taps, as in `refmoe.engines.capture.names`.

`watch` records the other taps.
"""

UNSEEN = ("attention.scores", "attention.probs", "expert.gate", "expert.up", "expert.hidden", "expert.output")

Record = Callable[[str, Any], None]


class Adapter:
    """Options: moe=triton (a `moe_backend` that chooses experts outside its kernel), memory=0.3 (of the GPU's)."""

    name = "vllm"
    dtypes = ("bfloat16", "float16", "float32")
    taps = tuple(tap for tap in TAPS if tap not in UNSEEN)
    abilities = ("decode", "sequences")
    policies: MappingProxyType[str, str] = MappingProxyType({})

    def __init__(self, moe: str = "triton", memory: str = "0.3") -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # hooks are closures, and cannot be sent to another process
        self.vllm: Any = require("vllm", "vllm", "the adapter of vLLM")
        self.version: str = self.vllm.__version__
        self.options = {"moe_backend": moe, "gpu_memory_utilization": float(memory)}
        self.llm: Any = None
        self.steps: list[Arrays] = []

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Build an `LLM` without graphs, chunked prefill and prefix cache, and hook its model."""
        if self.llm is not None:
            self.llm = None
            require("vllm.distributed", "vllm", "the adapter of vLLM").cleanup_dist_env_and_memory()
        self.llm = self.vllm.LLM(
            model=str(checkpoint), dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, enable_trace_replay=True,
            enable_prefix_caching=False, enable_chunked_prefill=False, async_scheduling=False, **self.options,
        )  # fmt: skip
        self.llm.apply_model(lambda model: watch(model, self._record))

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Make one request of each sequence: a prefill, then decodes of given tokens.

        Raises Skipped for runs that no request can make, RuntimeError when the engine makes other steps.
        """
        arrays: Arrays = {}
        for sequence in dict.fromkeys(run.sequence for run in runs):
            request = [run for run in runs if run.sequence == sequence]
            refuse_what_no_request_does(request)
            self.steps = []
            fed = [run.tokens[0] for run in request[1:]]
            sampling = self.vllm.SamplingParams(
                temperature=0.0, max_tokens=len(request), trace_decode_token_ids=[*fed, 0], detokenize=False
            )
            self.llm.generate({"prompt_token_ids": list(request[0].tokens)}, sampling, use_tqdm=False)
            if [len(step["embedding"]) for step in self.steps] != [len(run.tokens) for run in request]:
                raise RuntimeError(f"vLLM made {len(self.steps)} steps of the {len(request)} runs of a sequence")
            for run, step in zip(request, self.steps, strict=True):
                arrays |= {f"{run.run}/{tap}": array for tap, array in step.items()}
        return arrays

    def _record(self, tap: str, value: Any) -> None:
        if tap == "embedding":
            self.steps.append({})
        self.steps[-1][tap] = to_numpy(value)


def refuse_what_no_request_does(request: Sequence[Run]) -> None:
    """Raises Skipped unless the runs of a sequence are a prefill at position 0 and then decodes."""
    seen = 0
    for run in request:
        if run.past != seen or run.positions[0] != seen:
            raise Skipped(f"{run.run} cuts the cache or starts elsewhere than at position 0, which no request does")
        seen += len(run.tokens)


def watch(model: Any, record: Record) -> None:
    """Hook a `MixtralForCausalLM`.

    record: called with a tap and its value as soon as it is made, because later kernels overwrite it.
    """
    layers, attention = model.model.layers, model.model.layers[0].self_attn
    layer = [""]  # the prefix of the taps of the layer that runs now

    def headed(tap: str, value: Any) -> None:
        """value: [T, heads d]"""
        record(tap, value.unflatten(-1, (-1, attention.head_dim)))

    def leaving(name: str, _module: Any, _args: Any, out: Any) -> None:
        parts = out if isinstance(out, tuple) else (out,)
        for at, part in enumerate(parts):
            if tap := tap_of(NAMES, f"{name}:out{at}"):
                (headed if tap.endswith("attention.context") else record)(tap, part)
        if name == "model.norm":
            record(f"layers.{len(layers) - 1}.residual", parts[1])
            record("logits", model.compute_logits(parts[0]))

    def normed(i: int, _module: Any, _args: Any, out: Any) -> None:
        layer[0] = f"layers.{i}."
        if i:
            record(f"layers.{i - 1}.residual", out[1])

    def projected(_module: Any, _args: Any, out: Any) -> None:
        """Split the one product into queries, keys and values, in this order."""
        sizes = (attention.q_size, attention.kv_size, attention.kv_size)
        for name, part in zip("qkv", out[0].split(sizes, dim=-1), strict=True):
            headed(f"{layer[0]}attention.{name}", part)

    def rotated(_module: Any, _args: Any, out: Any) -> None:
        for name, part in zip("qk", out, strict=True):
            headed(f"{layer[0]}attention.{name}_rope", part)

    def choosing(select: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        weights, experts = select(*args, **kwargs)
        record(f"{layer[0]}router.experts", experts)
        record(f"{layer[0]}router.weights", weights)
        return weights, experts

    for name, module in model.named_modules():
        module.register_forward_hook(partial(leaving, name))
    for i, block in enumerate(layers):
        block.input_layernorm.register_forward_hook(partial(normed, i))
        block.self_attn.qkv_proj.register_forward_hook(projected)
        router = block.block_sparse_moe.experts.router
        router.select_experts = partial(choosing, router.select_experts)
    for rope in {block.self_attn.rotary_emb for block in layers}:  # vLLM shares one among all layers
        rope.register_forward_hook(rotated)
