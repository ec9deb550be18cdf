# SPDX-License-Identifier: Apache-2.0
"""TransformerLens's own Mixtral (`HookedTransformer`) on a CPU, watched at its hook points.

Every tap is seen. A slot of its cache is a position, so that no sequence can start above 0. The cache holds keys before
their rotation, and each call rotates all of them again. It takes dim / heads for head_dim. It makes its experts and its
router in float32, whatever the dtype; the adapter casts the model, as a user has to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.engines.adapter import Arrays, Skipped, refuse_shifted
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.transformers import load_model, module_hooks, to_numpy
from refmoe.engines.environment import needed
from refmoe.engines.options import TORCH_THREADS
from refmoe.engines.protocol import ABILITIES, DTYPES, TAPS
from refmoe.files.json_file import read_json
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

NAMES = {
    "hook_embed:out": "embedding",
    "blocks.{i}.ln1:out": "attention_norm",
    "blocks.{i}.attn.hook_q:out": "attention.q",
    "blocks.{i}.attn.hook_k:out": "attention.k",
    "blocks.{i}.attn.hook_v:out": "attention.v",
    "blocks.{i}.attn.hook_rot_q:out": "attention.q_rope",
    "blocks.{i}.attn.hook_rot_k:out": "attention.k_rope",  # of all tokens so far
    "blocks.{i}.attn.hook_pattern:out": "attention.probs",
    "blocks.{i}.attn.hook_z:out": "attention.context",
    "blocks.{i}.hook_attn_out:out": "attention.output",
    "blocks.{i}.hook_resid_mid:out": "attention_residual",
    "blocks.{i}.ln2:out": "moe_norm",
    "blocks.{i}.mlp.W_gate:out": "router.logits",
    "blocks.{i}.mlp.hook_expert_indices:out": "router.experts",
    "blocks.{i}.hook_mlp_out:out": "moe.output",
    "blocks.{i}.hook_resid_post:out": "residual",
    "ln_final:out": "final_norm",
    "unembed:out": "logits",
}
"""Modules of transformer_lens/HookedTransformer.py to taps, as in `refmoe.engines.capture.names`."""
INSIDE = {"W_gate": "expert.gate", "W_in": "expert.up", "W_out": "expert.output"}
"""Modules of an expert to the taps that they give."""
FLOAT64 = "+".join((
    "hf-float64", "norm.input=float64", "norm.normed=float64", "attention.softmax_input=float64",
    "attention.probs=float64",
))  # fmt: skip
"""`RMSNorm.forward` and `AbstractAttention.forward` keep float64, unlike those of transformers.

`MoE.forward` takes its softmax in float32 in any dtype. When a model is loaded, `ProcessWeights.process_weights` rounds
its table of cosines and sines to float32.
"""


class Adapter:
    """A `HookedTransformer` without any processing of its weights."""

    name = "transformer-lens"
    dtypes = DTYPES
    taps = TAPS
    abilities = ABILITIES
    policies = MappingProxyType({
        "float64": FLOAT64,
        "float32": "hf-float32",
        "bfloat16": "hf-bfloat16+router.weights=bfloat16",
        "float16": "hf-float16+router.weights=float16",
    })  # fmt: skip
    options = MappingProxyType({"threads": TORCH_THREADS})
    requirements = ("torch==2.13.0", "transformers==5.23.0", "transformer-lens==3.9.0")

    def __init__(self, threads: str = "1") -> None:
        """Raises InputError when TransformerLens is missing."""
        self.torch: Any = needed("torch", "transformer_lens")
        self.torch.set_num_threads(int(threads))
        self.lens: Any = needed("transformer_lens", "transformer_lens")
        self.loading: Any = needed("transformer_lens.loading_from_pretrained", "transformer_lens")
        self.version = f"{version('transformer-lens')} (torch {version('torch')})"

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load the checkpoint by way of transformers. Raises Skipped for a head_dim that TransformerLens drops."""
        values = read_json(checkpoint / "config.json").values
        derived = values["hidden_size"] // values["num_attention_heads"]
        if values["head_dim"] != derived:
            raise Skipped(f"TransformerLens takes dim / heads = {derived} for head_dim; it is {values['head_dim']}")
        kind = getattr(self.torch, dtype)
        config = self.loading.get_pretrained_model_config(str(checkpoint), device="cpu", dtype=kind)
        config.tokenizer_name = None  # tokens are given as numbers
        weights = self.loading.get_pretrained_state_dict(
            str(checkpoint), config, hf_model=load_model(checkpoint, dtype), dtype=kind
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.model = self.lens.HookedTransformer(config)
        self.model.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        self.model.to(kind).eval()

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call with the cache of its sequence. Raises Skipped for a position that is not its slot."""
        for run in runs:
            refuse_shifted("TransformerLens", run)
            if run.positions[-1] >= self.model.cfg.n_ctx:
                raise Skipped(f"TransformerLens has angles for {self.model.cfg.n_ctx} positions; {run.run} has more")
        caches: dict[int, Any] = {}
        watch = Watch(self.model, frozenset(taps))
        with self.torch.no_grad(), watch.hooks(self.torch):
            for run in runs:
                watch.recorder.begin(run)
                watch.tokens = len(run.tokens)
                if run.sequence not in caches:
                    made = self.lens.TransformerLensKeyValueCache.init_cache(self.model.cfg, "cpu")
                    caches[run.sequence] = made
                cut(caches[run.sequence], run.past)
                tokens = self.torch.tensor([run.tokens])
                self.model(
                    tokens, attention_mask=self.torch.ones_like(tokens), past_kv_cache=caches[run.sequence]
                )  # fmt: skip
        return watch.recorder.arrays


def cut(cache: Any, past: int) -> None:
    """Cut a cache to so many tokens."""
    cache.previous_attention_mask = cache.previous_attention_mask[:, :past]
    for entry in cache.entries:
        entry.past_keys, entry.past_values = entry.past_keys[:, :past], entry.past_values[:, :past]


class Watch:
    """Records the taps of a model while it runs."""

    def __init__(self, model: Any, wanted: Collection[str]) -> None:
        """wanted: taps without layer"""
        self.model, self.wanted, self.recorder = model, wanted, Recorder()
        self.tokens = 0
        """The tokens of the call that runs now."""
        self.layer = ""
        """The prefix of the taps of the layer that runs now."""
        self.chosen: NDArray[Any] = np.zeros((0, 0), np.int64)
        """The experts of the layer that runs now, [T, k]."""
        self.slots: dict[str, NDArray[Any]] = {}
        """The taps of its experts, [T, k, n], as far as they have run."""

    @contextmanager
    def hooks(self, torch: Any) -> Iterator[None]:
        """While the context lasts, every tap is recorded."""
        attention: Any = needed("transformer_lens.components", "transformer_lens").GroupedQueryAttention
        with ExitStack() as stack:
            for i, block in enumerate(self.model.blocks):
                stack.callback(block.register_forward_pre_hook(partial(self._begin, f"layers.{i}.")).remove)
                stack.callback(block.mlp.register_forward_hook(self._end_of_experts).remove)
                for number, expert in enumerate(block.mlp.experts):
                    for name, tap in INSIDE.items():
                        hook = partial(self._inside, number, tap)
                        stack.callback(getattr(expert, name).register_forward_hook(hook).remove)
            stack.enter_context(module_hooks(self.model, NAMES, self._made))
            stack.enter_context(replaced(attention, "calculate_attention_scores", self._scored(attention)))
            stack.enter_context(weights_seen(torch, lambda made: self._record(f"{self.layer}router.weights", made)))
            yield

    def _begin(self, layer: str, *_: Any) -> None:
        self.layer = layer

    def _made(self, tap: str, value: Any) -> None:
        """Record what a module gives.   value: [1, T, ...] or [1, H, T, S]; of the router [T, n]"""
        step = step_of(tap)
        if step == "router.experts":
            self.chosen, self.slots = value.numpy().astype(np.int64), {}
            if step in self.wanted:
                self.recorder(tap, self.chosen)
            return
        value = value if step == "router.logits" else value[0]
        self._record(tap, value[-self.tokens :] if step == "attention.k_rope" else value)

    def _scored(self, attention: Any) -> Callable[..., Any]:
        """The method that computes the scores, before they are masked: [1, H, T, S]."""
        compute = attention.calculate_attention_scores

        def calculate(module: Any, *args: Any, **kwargs: Any) -> Any:
            made = compute(module, *args, **kwargs)
            self._record(f"{self.layer}attention.scores", made[0])
            return made

        return calculate

    def _inside(self, number: int, tap: str, _module: Any, args: Any, made: Any) -> None:
        """Sort the rows of an expert into the slots. They are those of the tokens of slot 0, then of slot 1."""
        slot, token = np.nonzero((self.chosen == number).T)
        for name, value in {tap: made, **({"expert.hidden": args[0]} if tap == "expert.output" else {})}.items():
            if name in self.wanted:
                rows = to_numpy(value)
                if name not in self.slots:
                    self.slots[name] = np.zeros((*self.chosen.shape, rows.shape[-1]), rows.dtype)
                self.slots[name][token, slot] = rows

    def _end_of_experts(self, *_: Any) -> None:
        for name, array in self.slots.items():
            self.recorder(f"{self.layer}{name}", array)

    def _record(self, tap: str, value: Any) -> None:
        if step_of(tap) in self.wanted:
            self.recorder(tap, to_numpy(value))


@contextmanager
def weights_seen(torch: Any, see: Callable[[Any], None]) -> Iterator[None]:
    """While the context lasts, `see` gets the weights of the chosen experts, [T, k], as they multiply the outputs.

    `MoE.forward` divides what `topk` gives in place, and then casts it. Neither is in the output of a module.
    """
    mode: Any = torch.overrides.TorchFunctionMode

    class Router(mode):  # type: ignore[misc]
        largest: Any = None

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func is torch.topk:
                self.largest = made[0]
            elif func is torch.Tensor.to and args[0] is self.largest:
                see(made)
            return made

    with Router():
        yield
