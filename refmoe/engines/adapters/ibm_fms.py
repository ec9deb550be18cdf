# SPDX-License-Identifier: Apache-2.0
"""The Mixtral of IBM's foundation-model-stack (ibm-fms) on a CPU, watched by hooks.

Scores and probabilities stay inside torch's `scaled_dot_product_attention` and are not seen. ibm-fms has no window, no
head_dim of its own, and angles for as many positions as the configuration says. It rotates adjacent pairs, as Mistral's
layout does. So the adapter turns queries and keys to half-split order for the trace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.shapes import HEADED, half_split
from refmoe.engines.capture.transformers import DTYPES, module_hooks, to_numpy
from refmoe.engines.environment import needed
from refmoe.engines.options import TORCH_THREADS, Option
from refmoe.engines.protocol import ABILITIES, TAPS
from refmoe.files.json_file import read_json
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

NAMES = {
    "base_model.embedding:out": "embedding",
    "base_model.layers.{i}.ln:out": "attention_norm",
    "base_model.layers.{i}.attn.in_proj:out0": "attention.q",
    "base_model.layers.{i}.attn.in_proj:out1": "attention.k",
    "base_model.layers.{i}.attn.in_proj:out2": "attention.v",
    "base_model.layers.{i}.attn.dense:in": "attention.context",
    "base_model.layers.{i}.attn.dense:out": "attention.output",
    "base_model.layers.{i}.ff_ln:in": "attention_residual",
    "base_model.layers.{i}.ff_ln:out": "moe_norm",
    "base_model.layers.{i}.ff_sub_layer.gate:out": "router.logits",
    "base_model.layers.{i}.ff_sub_layer:out": "moe.output",
    "base_model.dec_norm:out": "final_norm",
    "head:out": "logits",
}
"""Modules of fms/models/mixtral.py, `Mixtral`, to taps, as in `refmoe.engines.capture.names`."""

UNSEEN = ("attention.scores", "attention.probs")
TURNED = ("attention.q", "attention.k", "attention.q_rope", "attention.k_rope")
"""Taps whose rotary pairs are adjacent."""
COMBINED = "tai,ta -> ti"
"""The equation of the sum of a token's experts: outputs, weights."""


class Adapter:
    """A `Mixtral` of ibm-fms."""

    name = "ibm-fms"
    dtypes = DTYPES
    taps = tuple(tap for tap in TAPS if tap not in UNSEEN)
    abilities: tuple[str, ...] = ABILITIES
    policies = MappingProxyType(
        {"float32": "hf-float32", **{dtype: f"fms-{dtype}" for dtype in ("float64", "bfloat16", "float16")}}
    )
    options = MappingProxyType({
        "cache": Option("whether calls have a cache; without one only first calls run, as by default", ("yes", "no")),
        "threads": TORCH_THREADS,
    })  # fmt: skip
    requirements = ("torch==2.13.0", "ibm-fms==1.13.1")

    def __init__(self, cache: str = "yes", threads: str = "1") -> None:
        self.cached = cache == "yes"
        if not self.cached:
            self.abilities = ("sequences",)
        self.torch: Any = needed("torch", "ibm_fms")
        self.torch.set_num_threads(int(threads))
        self.engine: Any = needed("fms.models.mixtral", "ibm_fms")
        self.version = f"{version('ibm-fms')} (torch {version('torch')})"

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load the checkpoint. Raises Skipped for a head_dim that ibm-fms does not know."""
        values = read_json(checkpoint / "config.json").values
        derived = values["hidden_size"] // values["num_attention_heads"]
        if values["head_dim"] != derived:
            raise Skipped(f"ibm-fms knows no head_dim but dim / heads = {derived}; it is {values['head_dim']}")
        self.window, self.context = values["sliding_window"], values["max_position_embeddings"]
        loading: Any = needed("safetensors.torch", "ibm_fms")
        config = self.engine.MixtralConfig(
            src_vocab_size=values["vocab_size"], dim=values["hidden_size"], norm_eps=values["rms_norm_eps"],
            nheads=values["num_attention_heads"], kvheads=values["num_key_value_heads"],
            nlayers=values["num_hidden_layers"], hidden_dim=values["intermediate_size"],
            num_experts=values["num_local_experts"], top_k_experts=values["num_experts_per_tok"],
            max_expected_seq_len=self.context, rope_base=values["rope_theta"],
        )  # fmt: skip
        self.model = self.engine.Mixtral(config)
        self.model.load_state_dict(self._named(loading.load_file(checkpoint / "model.safetensors"), values))
        self.model.to(getattr(self.torch, dtype)).eval()
        self.model.post_init()
        self.head_dim = derived

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call. Raises Skipped for a window that would hide tokens, and for positions beyond the table."""
        longest = max(run.past + len(run.tokens) for run in runs)
        if self.window is not None and longest > self.window:
            raise Skipped(f"ibm-fms's Mixtral has no window; this model's is {self.window}, and a call sees {longest}")
        last = max(max(run.positions) for run in runs)
        if last >= self.context:
            raise Skipped(f"ibm-fms has angles for {self.context} positions; a call has position {last}")
        watch = Watch(self.model, self.head_dim, frozenset(taps))
        with self.torch.no_grad(), watch.hooks():
            caches: dict[int, Any] = {}
            for run in runs:
                watch.recorder.begin(run)
                tokens, positions = self.torch.tensor([run.tokens]), self.torch.tensor([run.positions])
                if not self.cached:
                    self.model(tokens, position_ids=positions)
                    continue
                past, mask = run.past, {}
                cache = [[each[:, :, :past] for each in layer] for layer in caches.get(run.sequence, [])]
                if past and len(run.tokens) > 1:  # ibm-fms hides later tokens by itself in a first call alone
                    visible = self.torch.ones(len(run.tokens), past + len(run.tokens), dtype=self.torch.bool)
                    mask = {"mask": visible.tril(past)[None]}
                _, caches[run.sequence] = self.model(
                    tokens, position_ids=positions, past_key_value_states=cache, use_cache=True,
                    attn_name="sdpa_causal", **mask,
                )  # fmt: skip
        return watch.recorder.arrays

    def _named(self, given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """The weights of a Hugging Face checkpoint under the names of ibm-fms, whose projections are fused."""
        torch, experts = self.torch, range(values["num_local_experts"])
        heads = {"q": values["num_attention_heads"], "k": values["num_key_value_heads"]}

        def adjacent(weight: Any, heads: int) -> Any:
            """Rows of rotary pairs side by side.   weight: [heads d, D], half-split"""
            return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)

        named = {
            "base_model.embedding.weight": given["model.embed_tokens.weight"],
            "base_model.dec_norm.weight": given["model.norm.weight"],
            "head.weight": given["lm_head.weight"],
        }
        for i in range(values["num_hidden_layers"]):
            of, to = f"model.layers.{i}.", f"base_model.layers.{i}."
            q, k, v = (given[f"{of}self_attn.{name}_proj.weight"] for name in "qkv")
            moe = f"{of}block_sparse_moe."
            w1, w2, w3 = ([given[f"{moe}experts.{e}.{name}.weight"] for e in experts] for name in ("w1", "w2", "w3"))
            fused = torch.cat([adjacent(q, heads["q"]), adjacent(k, heads["k"]), v])
            named |= {
                f"{to}ln.weight": given[f"{of}input_layernorm.weight"],
                f"{to}ff_ln.weight": given[f"{of}post_attention_layernorm.weight"],
                f"{to}attn.in_proj.qkv_fused.weight": fused,
                f"{to}attn.dense.weight": given[f"{of}self_attn.o_proj.weight"],
                f"{to}ff_sub_layer.gate.weight": given[f"{moe}gate.weight"],
                f"{to}ff_sub_layer.cond_ffn.w13": torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)]),
                f"{to}ff_sub_layer.cond_ffn.w2": torch.stack(w2),
            }
        return named


class Watch:
    """Records the taps of a model while it runs."""

    def __init__(self, model: Any, head_dim: int, wanted: Collection[str]) -> None:
        """head_dim: d of the model.   wanted: taps without layer"""
        self.model, self.head_dim, self.wanted, self.recorder = model, head_dim, wanted, Recorder()
        self.layer = ""
        """The prefix of the taps of the layer that runs now."""

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While the context lasts, every tap is recorded."""
        torch: Any = needed("torch", "ibm_fms")
        rotary: Any = needed("fms.modules.positions", "ibm_fms").RotaryEmbedding
        rotate, combine, multiply = rotary.adjusted_qk, torch.einsum, torch.ops.moe.moe_mm
        first = [True]

        def rotated(*args: Any, **kwargs: Any) -> Any:
            made = rotate(*args, **kwargs)
            for name, value in zip(("q_rope", "k_rope"), made, strict=True):
                self._record(f"{self.layer}attention.{name}", value[0])
            return made

        def combined(equation: str, *given: Any) -> Any:
            if equation == COMBINED:
                self._record(f"{self.layer}router.weights", given[1])
            return combine(equation, *given)

        def multiplied(rows: Any, weights: Any, experts: Any, *rest: Any) -> Any:
            """The product with the first matrices of the chosen experts, then that with the second."""
            made = multiply(rows, weights, experts, *rest)
            if first[0]:
                self._record(f"{self.layer}router.experts", experts)
                for name, part in zip(("gate", "up"), made.chunk(2, dim=-1), strict=True):
                    self._record(f"{self.layer}expert.{name}", part)
            else:
                self._record(f"{self.layer}expert.hidden", rows.reshape(*experts.shape, -1))
                self._record(f"{self.layer}expert.output", made)
            first[0] = not first[0]
            return made

        with ExitStack() as stack:
            for i, block in enumerate(self.model.base_model.layers):
                begin = block.register_forward_pre_hook(partial(self._begin, f"layers.{i}."), with_kwargs=True)
                end = block.register_forward_hook(self._end, with_kwargs=True)
                stack.callback(begin.remove)
                stack.callback(end.remove)
            stack.enter_context(module_hooks(self.model, NAMES, self._seen))
            stack.enter_context(replaced(rotary, "adjusted_qk", rotated))
            stack.enter_context(replaced(torch, "einsum", combined))
            stack.enter_context(replaced(torch.ops.moe, "moe_mm", multiplied))
            yield

    def _begin(self, layer: str, *_: Any) -> None:
        self.layer = layer

    def _end(self, _module: Any, _args: Any, _kwargs: Any, made: Any) -> None:
        """made: the residual, [1, T, D], with the cache behind it where there is one"""
        self._record(f"{self.layer}residual", (made[0] if isinstance(made, tuple) else made)[0])

    def _seen(self, tap: str, value: Any) -> None:
        """Record what a module has got or given.   value: [1, T, n]; of the router [T, E]"""
        step = step_of(tap)
        if step == "router.logits":
            self._record(tap, value)
            return
        value = value[0]
        if step in HEADED:
            value = value.reshape(len(value), -1, self.head_dim)
        self._record(tap, value)

    def _record(self, tap: str, value: Any) -> None:
        step = step_of(tap)
        if step in self.wanted:
            array = to_numpy(value)
            self.recorder(tap, half_split(array) if step in TURNED else array)
