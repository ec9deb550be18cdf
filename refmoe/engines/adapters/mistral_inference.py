# SPDX-License-Identifier: Apache-2.0
"""mistral-inference on a CPU, watched by hooks. Its attention kernel is replaced.

It calls memory_efficient_attention of xformers, which has no kernel for a CPU. The adapter puts a plain one in its
place: scores in the model's dtype, softmax in float32. All else is the engine's own code, cache and masks included.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.capture.names import MISTRAL
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.shapes import HEADED, half_split, put_rows
from refmoe.engines.capture.transformers import module_hooks, to_numpy
from refmoe.engines.environment import needed
from refmoe.engines.options import TORCH_THREADS
from refmoe.engines.protocol import ABILITIES, DTYPES, TAPS
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

UNSEEN = ("attention.scores", "attention.probs")
TURNED = ("attention.q", "attention.k", "attention.q_rope", "attention.k_rope")
"""Taps whose rotary pairs are interleaved."""
FLOAT64 = "+".join((
    "float64", "statistics=float32", "compared=stored", "norm.normed=float32", "rope.table=float32",
    "rope.products=float32", "attention.q_rope=float32", "attention.k_rope=float32", "attention.probs=float32",
    "router.weights=float32",
))  # fmt: skip
"""`RMSNorm.forward`, `apply_rotary_emb` and `MoeLayer.forward` of mistral-inference compute in float32 in any dtype.

So does the softmax of `attention` below.
"""
INSIDE = {"w1": "expert.gate", "w3": "expert.up", "w2": "expert.output"}


class Adapter:
    """A `Transformer` of mistral-inference, one sequence a call."""

    name = "mistral-inference"
    dtypes = DTYPES
    layouts = ("mistral",)
    taps = tuple(tap for tap in TAPS if tap not in UNSEEN)
    abilities = ABILITIES
    policies = MappingProxyType({"float64": FLOAT64})
    options = MappingProxyType({"threads": TORCH_THREADS})
    requirements = ("torch==2.13.0", "xformers==0.0.35", "mistral-inference==1.6.0")

    def __init__(self, threads: str = "1") -> None:
        """Raises InputError when mistral-inference is missing."""
        self.layers: Any = needed("mistral_inference.transformer_layers", "mistral_inference")
        self.torch: Any = needed("torch", "mistral_inference")
        self.torch.set_num_threads(int(threads))
        self.version = f"{version('mistral-inference')} (torch {version('torch')})"
        self.model: Any = None

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a checkpoint of Mistral's layout."""
        transformer: Any = needed("mistral_inference.transformer", "mistral_inference").Transformer
        self.dtype = getattr(self.torch, dtype)
        self.model = transformer.from_folder(checkpoint, device="cpu", dtype=self.dtype).eval()

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call with the cache of its sequence. Raises Skipped for a sequence that starts above position 0."""
        caching: Any = needed("mistral_inference.cache", "mistral_inference")
        args, caches = self.model.args, dict[int, Any]()
        recorder, longest = Recorder(), max(run.past + len(run.tokens) for run in runs)
        with self.torch.no_grad(), Watch(self.model, recorder, self.layers, self.torch):
            for run in runs:
                if run.positions != tuple(range(run.past, run.past + len(run.tokens))):
                    raise Skipped(f"{run.run} has positions {run.positions}, but a cache cell is a position here")
                if run.sequence not in caches:
                    caches[run.sequence] = caching.BufferCache(
                        n_layers=args.n_layers, max_batch_size=1, max_seq_len=longest, n_kv_heads=args.n_kv_heads,
                        head_dim=args.head_dim, sliding_window=args.sliding_window,
                    ).to("cpu", self.dtype)  # fmt: skip
                cache = caches[run.sequence]
                if cache.kv_seqlens is not None:
                    cache.kv_seqlens[:] = run.past
                recorder.begin(run)
                self.model(self.torch.tensor(run.tokens), [len(run.tokens)], cache=cache)
        return recorder.arrays


class Watch(ExitStack):
    """While the context lasts, `recorder` gets every tap that a module or a function of the engine makes."""

    def __init__(self, model: Any, recorder: Recorder, layers: Any, torch: Any) -> None:
        """layers: the module mistral_inference.transformer_layers"""
        super().__init__()
        self.model, self.recorder, self.layers, self.torch = model, recorder, layers, torch
        self.layer = ""
        """The prefix of the taps of the layer that runs."""
        self.chosen: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        """The experts of each token of this layer, [T, k]."""
        self.slots: dict[str, NDArray[Any]] = {}

    def __enter__(self) -> Watch:
        super().__enter__()
        self.enter_context(module_hooks(self.model, MISTRAL, self._made))
        for name, block in self.model.layers.items():
            self._hook(block.register_forward_pre_hook(partial(self._entering, f"layers.{name}.")))
            moe = block.feed_forward
            self._hook(moe.gate.register_forward_hook(partial(self._routed, moe.args.num_experts_per_tok)))
            # a block calls `forward` of the layer, which no hook sees
            moe.forward = partial(self._combined, moe.forward)
            self.callback(delattr, moe, "forward")
            for number, expert in enumerate(moe.experts):
                for matrix, tap in INSIDE.items():
                    hook = partial(self._inside, number, tap)
                    self._hook(getattr(expert, matrix).register_forward_hook(hook))
        self.enter_context(replaced(self.layers, "apply_rotary_emb", self._rotated(self.layers.apply_rotary_emb)))
        self.enter_context(replaced(self.layers, "memory_efficient_attention", partial(attention, self.torch)))
        return self

    def _hook(self, handle: Any) -> None:
        self.callback(handle.remove)

    def _made(self, tap: str, value: Any) -> None:
        """Record a tap of a module, heads on an axis of their own.   value: [T, n]"""
        array = to_numpy(value)
        if step_of(tap) in HEADED:
            array = array.reshape(len(array), -1, self.model.args.head_dim)
        self.recorder(tap, half_split(array) if step_of(tap) in TURNED else array)

    def _entering(self, prefix: str, _module: Any, _args: Any) -> None:
        self.layer = prefix

    def _rotated(self, rotate: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            made = rotate(*args, **kwargs)
            for name, heads in zip("qk", made, strict=True):
                self.recorder(f"{self.layer}attention.{name}_rope", half_split(to_numpy(heads)))
            return made

        return wrapped

    def _routed(self, k: int, _module: Any, _args: Any, logits: Any) -> None:
        """Choose again as `MoeLayer.forward` does: what it chooses is in no module's output.   logits: [T, E]"""
        weights, experts = self.torch.topk(logits, k)
        weights = self.torch.softmax(weights, dim=1, dtype=self.torch.float32).to(logits.dtype)
        self.chosen, self.slots = experts.numpy(), {}
        self.recorder(f"{self.layer}router.experts", self.chosen)
        self.recorder(f"{self.layer}router.weights", to_numpy(weights))

    def _inside(self, number: int, tap: str, _module: Any, args: Any, out: Any) -> None:
        """Sort the rows of an expert, which are in order of tokens, into the slots of router.experts."""
        for name, value in {tap: out, **({"expert.hidden": args[0]} if tap == "expert.output" else {})}.items():
            put_rows(self.slots, name, to_numpy(value), self.chosen, number)

    def _combined(self, forward: Any, x: Any) -> Any:
        out = forward(x)
        for tap, array in self.slots.items():
            self.recorder(self.layer + tap, array)
        self.recorder(f"{self.layer}moe.output", to_numpy(out))
        return out


def attention(torch: Any, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    """Plain attention with the arguments of memory_efficient_attention.

    q: [1, T, H, d]   k, v: [1, S, H, d]   bias: a mask of xformers   returns: [1, T, H, d]
    Unused cells of the cache are hidden from every row, and may hold anything.
    """
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.isneginf(bias.materialize(scores.shape[-2:], dtype=torch.float32, device=scores.device))
    v = v.masked_fill(hidden.all(0)[None, None, :, None], 0)
    probs = scores.masked_fill(hidden, float("-inf")).float().softmax(-1).to(scores.dtype)
    return (probs @ v).transpose(1, 2).contiguous()
