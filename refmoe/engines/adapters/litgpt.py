# SPDX-License-Identifier: Apache-2.0
"""litgpt's Mixtral on a CPU, watched by hooks.

Scores and probabilities stay inside torch's `scaled_dot_product_attention` and are not seen. A slot of litgpt's cache
is a position, so that no sequence can start above 0. With a window the cache is a ring of that many slots. litgpt
refuses a call of more tokens, unless it runs without a cache. The adapter runs a sequence of one call without a cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.engines.adapter import Arrays, Skipped, refuse_shifted
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.shapes import put_rows
from refmoe.engines.capture.transformers import DTYPES, module_hooks, to_numpy
from refmoe.engines.environment import needed
from refmoe.engines.options import TORCH_THREADS
from refmoe.engines.protocol import ABILITIES, TAPS
from refmoe.files.json_file import read_json
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

NAMES = {
    "transformer.wte:out": "embedding",
    "transformer.h.{i}.norm_1:out": "attention_norm",
    "transformer.h.{i}.attn.qkv:out": "attention.qkv",  # three taps, one behind the other
    "transformer.h.{i}.attn.proj:in": "attention.context",
    "transformer.h.{i}.attn.proj:out": "attention.output",
    "transformer.h.{i}.norm_2:in": "attention_residual",
    "transformer.h.{i}.norm_2:out": "moe_norm",
    "transformer.h.{i}.mlp.gate:out": "router.logits",
    "transformer.h.{i}.mlp:out": "moe.output",
    "transformer.h.{i}:out": "residual",
    "transformer.ln_f:out": "final_norm",
    "lm_head:out": "logits",
}
"""Modules of litgpt/model.py, `GPT`, to taps, as in `refmoe.engines.capture.names`."""

UNSEEN = ("attention.scores", "attention.probs")


class Adapter:
    """A `GPT` of litgpt."""

    name = "litgpt"
    dtypes = DTYPES
    taps = tuple(tap for tap in TAPS if tap not in UNSEEN)
    abilities = ABILITIES
    policies = MappingProxyType({dtype: f"litgpt-{dtype}" for dtype in ("float64", "bfloat16", "float16")})
    options = MappingProxyType({"threads": TORCH_THREADS})
    requirements = ("torch==2.13.0", "litgpt==0.5.13")

    def __init__(self, threads: str = "1") -> None:
        self.torch: Any = needed("torch", "litgpt")
        self.torch.set_num_threads(int(threads))
        self.engine: Any = needed("litgpt.model", "litgpt")
        self.version = f"{version('litgpt')} (torch {version('torch')})"

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Convert the checkpoint by litgpt's own function, and load it at this dtype."""
        converting: Any = needed("litgpt.scripts.convert_hf_checkpoint", "litgpt")
        loading: Any = needed("safetensors.torch", "litgpt")
        self.config = converted(read_json(checkpoint / "config.json").values)
        weights: dict[str, Any] = {}
        converting.copy_weights_hf_llama(self.config, {}, weights, loading.load_file(checkpoint / "model.safetensors"))
        self.dtype = getattr(self.torch, dtype)
        model = self.engine.GPT(self.config)
        model.load_state_dict(weights)
        for parameter in model.parameters():  # buffers stay: litgpt keeps cos and sin in float32
            parameter.data = parameter.data.to(self.dtype)
        self.model = model.eval()

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call with the cache of its sequence. Raises Skipped for calls that litgpt refuses."""
        refuse_early(runs, self.config.block_size, self.config.sliding_window_size)
        calls = Counter(run.sequence for run in runs)
        longest = max(run.positions[-1] for run in runs) + 1
        self.model.max_seq_length = longest
        caches: dict[int, list[Any]] = {}
        watch = Watch(self.model, frozenset(taps))
        with self.torch.no_grad(), watch.hooks(self.engine):
            for run in runs:
                watch.recorder.begin(run)
                tokens, where = self.torch.tensor([run.tokens]), self.torch.tensor(run.positions)
                if calls[run.sequence] == 1 and len(run.tokens) > (self.config.sliding_window_size or longest):
                    self.model(tokens)
                    continue
                if run.sequence not in caches:
                    self.model.set_kv_cache(1, longest, dtype=self.dtype)
                    caches[run.sequence] = [block.attn.kv_cache for block in self.model.transformer.h]
                for block, cache in zip(self.model.transformer.h, caches[run.sequence], strict=True):
                    block.attn.kv_cache = cache
                try:
                    self.model(tokens, where, input_pos_maxp1=run.positions[-1] + 1)
                except ValueError as error:
                    if "sliding window" not in str(error):
                        raise
                    raise Skipped(f"litgpt: {error}") from None
        return watch.recorder.arrays


def converted(values: dict[str, Any]) -> Any:
    """The configuration of litgpt. With a window, every layer has it.   values: of config.json"""
    config: Any = needed("litgpt.config", "litgpt").Config
    window, layers, heads = values["sliding_window"], values["num_hidden_layers"], values["num_attention_heads"]
    return config(
        name="mixtral", block_size=values["max_position_embeddings"], n_layer=layers, n_embd=values["hidden_size"],
        vocab_size=values["vocab_size"], padded_vocab_size=values["vocab_size"], n_head=heads,
        n_query_groups=values["num_key_value_heads"], head_size=values["head_dim"],
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        norm_eps=values["rms_norm_eps"], mlp_class_name="LLaMAMoE", intermediate_size=values["intermediate_size"],
        moe_intermediate_size=values["intermediate_size"], rope_base=values["rope_theta"],
        n_expert=values["num_local_experts"], n_expert_per_token=values["num_experts_per_tok"],
        sliding_window_size=window, sliding_window_indices=None if window is None else [1] * layers,
    )  # fmt: skip


def refuse_early(runs: Sequence[Run], context: int, window: int | None) -> None:
    """Raises Skipped for calls that litgpt's cache cannot hold."""
    seen: Counter[int] = Counter()
    for run in runs:
        refuse_shifted("litgpt", run)
        if run.positions[-1] >= context:
            raise Skipped(f"litgpt has angles for {context} positions; {run.run} has position {run.positions[-1]}")
        if window is not None and run.past < seen[run.sequence] > window:
            raise Skipped(f"litgpt's ring of {window} slots has overwritten tokens that {run.run} goes back to")
        seen[run.sequence] = run.past + len(run.tokens)


class Watch:
    """Records the taps of a model while it runs."""

    def __init__(self, model: Any, wanted: Collection[str]) -> None:
        """wanted: taps without layer"""
        self.model, self.wanted, self.recorder = model, wanted, Recorder()
        self.layer = ""
        """The prefix of the taps of the layer that runs now."""
        self.chosen: NDArray[Any] = np.zeros((0, 0), np.int64)
        """The experts of the layer that runs now, [T, k]."""
        self.slots: dict[str, NDArray[Any]] = {}
        """The taps of its experts, [T, k, n], as far as they have run."""

    @contextmanager
    def hooks(self, engine: Any) -> Iterator[None]:
        """While the context lasts, every tap is recorded.   engine: the module litgpt.model"""
        torch: Any = needed("torch", "litgpt")
        mode: Any = torch.overrides.TorchFunctionMode
        chosen, weighed, rotate = self._chosen, self._weighed, engine.apply_rope
        rotated = cycle(("q_rope", "k_rope"))

        class Router(mode):  # type: ignore[misc]
            """Sees the choice of experts, and the softmax of the chosen logits when it is cast."""

            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made = func(*args, **(kwargs or {}))
                if func is torch.topk:
                    chosen(made[1])
                elif func is torch.Tensor.softmax:
                    self.softmax = made
                elif func is torch.Tensor.to and args[0] is getattr(self, "softmax", None):
                    weighed(made)
                return made

        def rope(*args: Any) -> Any:
            made = rotate(*args)
            self._record(f"{self.layer}attention.{next(rotated)}", made[0].transpose(0, 1))
            return made

        with ExitStack() as stack:
            for i, block in enumerate(self.model.transformer.h):
                begin = block.register_forward_pre_hook(partial(self._begin, f"layers.{i}."))
                end = block.mlp.register_forward_hook(self._end)
                stack.callback(begin.remove)
                stack.callback(end.remove)
                for e, expert in enumerate(block.mlp.experts):
                    for handle in self._expert_hooks(e, expert):
                        stack.callback(handle.remove)
            stack.enter_context(module_hooks(self.model, NAMES, self._seen))
            stack.enter_context(replaced(engine, "apply_rope", rope))
            stack.enter_context(Router())
            yield

    def _begin(self, layer: str, *_: Any) -> None:
        self.layer = layer
        self.slots = {}

    def _end(self, *_: Any) -> None:
        for step, array in self.slots.items():
            self.recorder(f"{self.layer}{step}", array)

    def _seen(self, tap: str, value: Any) -> None:
        """Record what a module has got or given.   value: [1, T, n]; of the router [T, E]"""
        config, step = self.model.config, step_of(tap)
        if step == "attention.qkv":
            heads = (config.n_head, config.n_query_groups, config.n_query_groups)
            parts = value[0].split([n * config.head_size for n in heads], dim=-1)
            for name, n, part in zip("qkv", heads, parts, strict=True):
                self._record(f"{self.layer}attention.{name}", part.reshape(len(part), n, config.head_size))
        elif step == "attention.context":
            self._record(tap, value[0].reshape(value.shape[1], config.n_head, config.head_size))
        else:
            self._record(tap, value if step == "router.logits" else value[0])

    def _chosen(self, experts: Any) -> None:
        self.chosen = to_numpy(experts)
        self._record(f"{self.layer}router.experts", experts)

    def _weighed(self, weights: Any) -> None:
        self._record(f"{self.layer}router.weights", weights)

    def _expert_hooks(self, e: int, expert: Any) -> Iterator[Any]:
        """Hooks on one expert. It gets the rows of its tokens, in their order."""
        record: Callable[[str, Any], None] = partial(self._rows, e)
        yield expert.fc_1.register_forward_hook(lambda _, given, made: record("expert.gate", made))
        yield expert.fc_2.register_forward_hook(lambda _, given, made: record("expert.up", made))
        yield expert.proj.register_forward_hook(lambda _, given, made: record("expert.hidden", given[0]))
        yield expert.proj.register_forward_hook(lambda _, given, made: record("expert.output", made))

    def _rows(self, e: int, step: str, value: Any) -> None:
        """Sort the rows of an expert into the slots of `router.experts`.   value: [rows, n]"""
        if step in self.wanted:
            put_rows(self.slots, step, to_numpy(value), self.chosen, e)

    def _record(self, tap: str, value: Any) -> None:
        if step_of(tap) in self.wanted:
            self.recorder(tap, to_numpy(value))
