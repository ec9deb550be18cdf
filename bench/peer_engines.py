# SPDX-License-Identifier: Apache-2.0
"""Three engines behind one interface, each on the same weights from the formula, for `bench.peers`.

An engine's package is imported when the engine is made. Each engine runs in a process of its own, whose Python may lack
the packages of the others.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.native.lanes import lanes
from refmoe.arithmetic.native.mkl_ops import MklOps
from refmoe.arithmetic.native.ops import SIDE_BY_SIDE, NativeOps
from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.names import build_parameters, named_weights
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.weight import BFLOAT16, Weight
from refmoe.checkpoints.write import hf_config
from refmoe.spec.config import Config
from refmoe.spec.model import Caches, Model, Parameters, forward
from refmoe.steps.native import NATIVE_STEPS
from refmoe.traces.trace import Run

SEED = 1


class Engine(Protocol):
    """One sequence. Both methods return when the logits have been computed."""

    def prefill(self, tokens: Sequence[int]) -> Array:
        """Forget all tokens, then read a prompt. Returns the logits [T, V] of every token."""

    def step(self, token: int, position: int) -> Array:
        """Read one more token. Returns its logits [V]. Cached tokens from `position` on are forgotten."""


def in_memory(config: Config, stored: str, seed: int = SEED) -> Parameters:
    """The formula's weights, computed once and held. stored: a dtype's name; each is exact in bfloat16"""
    formula = named_weights(synthetic_checkpoint(config, seed).parameters)

    def held(name: str) -> Weight:
        exact = formula[name].read()
        values = exact.astype(BFLOAT16 if stored == "bfloat16" else stored)
        assert np.array_equal(values.astype(np.float32), exact)
        return Weight(name=name, shape=values.shape, dtype=values.dtype, source=lambda: values, origin=name)

    return build_parameters(config, held)


class Stopwatch:
    """A class to inherit from before a class of ops; it records the time spent in matrix products."""

    spent = 0.0
    clock = staticmethod(time.perf_counter)

    def linear(self, x: Any, weight: Any) -> Any:
        # with many rows, `linear` calls `multiply` a few times, and those calls are timed
        product = super().linear  # type: ignore[misc]
        return self._timed(product, x, weight) if len(x) < SIDE_BY_SIDE else product(x, weight)

    def multiply(self, *arguments: Any) -> None:
        self._timed(super().multiply, *arguments)  # type: ignore[misc]

    def matmul(self, a: Any, b: Any) -> Any:
        return self._timed(super().matmul, a, b)  # type: ignore[misc]

    def _timed(self, product: Any, *factors: Any) -> Any:
        inner, began = Stopwatch.spent, Stopwatch.clock()
        result = product(*factors)
        took = Stopwatch.clock() - began
        if lanes().busy == 1:
            Stopwatch.spent = inner + took  # replaces the time recorded by nested calls, which is a part of `took`
        else:
            Stopwatch.spent += took / lanes().busy  # the time of lanes that work in parallel counts once
        return result


class TimedNativeOps(Stopwatch, NativeOps):
    pass


class TimedMklOps(Stopwatch, MklOps):
    pass


class Refmoe:
    """`NativeOps` or `MklOps`, as in `refmoe generate`. The environment sets the number of threads."""

    def __init__(self, config: Config, blas: str, stored: str, timed: bool = False) -> None:
        """blas: "numpy" or "mkl".   stored: the weights' dtype.

        timed: record the time in matrix products, which costs a little.
        """
        room = 1 << 40
        if blas == "mkl":
            made: Any = (TimedMklOps if timed else MklOps)(np.float32, upcast_bytes=room, packed_bytes=room)
        else:
            made = (TimedNativeOps if timed else NativeOps)(np.float32, upcast_bytes=room)
        self.ops: Any = made
        self.model = Model(config, in_memory(config, stored), NATIVE_STEPS)
        self.prompt: Caches | None = None
        self.caches: Caches | None = None

    def prefill(self, tokens: Sequence[int]) -> Array:
        logits = self._run(tokens, 0, None)
        self.prompt = self.caches
        return logits

    def step(self, token: int, position: int) -> Array:
        assert self.prompt is not None
        before = self.prompt if position == len(self.prompt[0].positions) else self.caches
        return self._run([token], position, before)[0]

    def _run(self, tokens: Sequence[int], past: int, before: Caches | None) -> Array:
        ops = self.ops
        positions = ops.integers(range(past, past + len(tokens)))
        logits, self.caches = forward(ops, self.model, ops.integers(tokens), positions, before)
        return logits  # type: ignore[no-any-return]


class Transformers:
    """`MixtralForCausalLM`, with torch's fused attention kernel and a choice of `experts_implementation`."""

    def __init__(self, config: Config, threads: int, experts: str) -> None:
        """experts: "eager", one by one; "grouped_mm", each of their matrices as one grouped product."""
        import torch
        import transformers
        from transformers.initialization import no_init_weights

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        theirs = transformers.MixtralConfig(**hf_config(config, "float32", rope_parameters=True))
        theirs._attn_implementation, theirs._experts_implementation = "sdpa", experts
        with no_init_weights():
            self.model = transformers.MixtralForCausalLM(theirs).float().eval()
        fill(self.model, config)
        self.torch, self.new_cache = torch, transformers.DynamicCache
        self.cache = self.new_cache()

    def prefill(self, tokens: Sequence[int]) -> Array:
        self.cache, self.prompt = self.new_cache(), len(tokens)
        return self._run(tokens, 0)

    def step(self, token: int, position: int) -> Array:
        if position == self.prompt < self.cache.get_seq_length():
            self.cache.crop(self.prompt - self.cache.get_seq_length())
        return self._run([token], position)[0]

    def _run(self, tokens: Sequence[int], past: int) -> Array:
        ids = self.torch.tensor([tokens])
        positions = self.torch.arange(past, past + len(tokens))[None]
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True)
        return out.logits[0].numpy()  # type: ignore[no-any-return]


def fill(model: Any, config: Config) -> None:
    """Copy the formula's weights into a `MixtralForCausalLM`, one at a time."""
    weights = named_weights(synthetic_checkpoint(config, SEED).parameters)
    base = model.model
    places = {"embedding": base.embed_tokens.weight, "final_norm": base.norm.weight, "output": model.lm_head.weight}
    for i, layer in enumerate(base.layers):
        ours, experts = f"layers.{i}.", layer.mlp.experts
        places[ours + "attention_norm"] = layer.input_layernorm.weight
        places[ours + "moe_norm"] = layer.post_attention_layernorm.weight
        places[ours + "router.gate"] = layer.mlp.gate.weight
        for name in "qkvo":
            places[f"{ours}attention.w{name}"] = getattr(layer.self_attn, f"{name}_proj").weight
        for e in range(config.experts):
            places[f"{ours}experts.{e}.w1"] = experts.gate_up_proj[e, : config.hidden_dim]
            places[f"{ours}experts.{e}.w3"] = experts.gate_up_proj[e, config.hidden_dim :]
            places[f"{ours}experts.{e}.w2"] = experts.down_proj[e]
    for name, weight in weights.items():
        places[name].detach().numpy()[...] = weight.read()


CELLS = 256
"""llama.cpp allocates the cache of a sequence in multiples of this number of cells."""


class LlamaCpp:
    """llama.cpp without a callback, flash attention off, cache in float32."""

    def __init__(self, config: Config, threads: int, gguf: Path, longest: int) -> None:
        """gguf: written by `write`.   longest: tokens that the cache has room for."""
        from refmoe.engines.adapters import llama_cpp_library as native

        self.library, self.decode, self.vocab = native.load_library(print), native.decode, config.vocab
        self.library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
        self.library.llama_get_logits.argtypes = [ctypes.c_void_p]
        model = self.library.llama_model_load_from_file(bytes(gguf), self.library.llama_model_default_params())
        if not model:
            raise RuntimeError("llama.cpp does not load the model; what it says is on standard error")
        cells = -(-longest // CELLS) * CELLS
        options = {"n_ctx": cells, "n_batch": cells, "n_ubatch": cells, "n_outputs_max_per_seq": cells}
        options |= {"type_k": native.TYPES["float32"], "type_v": native.TYPES["float32"]}
        options |= {"n_threads": threads, "n_threads_batch": threads, "flash_attn_type": native.FLASH["off"]}
        self.context = native.new_context(self.library, model, None, options)

    @staticmethod
    def write(config: Config, gguf: Path) -> None:
        write_gguf(gguf, config, synthetic_checkpoint(config, SEED).parameters)

    def prefill(self, tokens: Sequence[int]) -> Array:
        return self._run(tokens, 0)

    def step(self, token: int, position: int) -> Array:
        return self._run([token], position)[0]

    def _run(self, tokens: Sequence[int], past: int) -> Array:
        """Remove the cache from position `past` on, then read the tokens."""
        positions = tuple(range(past, past + len(tokens)))
        self.decode(
            self.library,
            self.context,
            Run(run="bench", op="chunk", sequence=0, tokens=tuple(tokens), positions=positions, past=past),
            0,
        )
        # waits until the computation is complete
        logits = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (len(tokens), self.vocab)).copy()
