# SPDX-License-Identifier: Apache-2.0
"""tinygrad's language model (tinygrad/llm) on a CPU, from a GGUF file. Its modules are wrapped.

Scores and probabilities stay inside `Tensor.scaled_dot_product_attention` and are not seen. A slot of its cache is a
position, so that no sequence can start above 0. It has no window. tinygrad renormalises the weights of chosen
experts only where the file has the key expert_weights_norm. llama.cpp's converter does not write it for a Mixtral.
tinygrad compiles each operation: the variable CC names the compiler, clang by default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.engines.adapter import Arrays, Skipped, refuse_shifted
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.shapes import HEADED
from refmoe.engines.environment import needed
from refmoe.engines.options import Option
from refmoe.engines.protocol import ABILITIES, TAPS
from refmoe.files.scratch import Scratch
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

OUTPUTS = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.output",
    "ffn_norm": "moe_norm",
    "ffn_gate_inp": "router.logits",
    "ffn_gate_exps": "expert.gate",
    "ffn_up_exps": "expert.up",
    "ffn_down_exps": "expert.output",
    "_feed_forward": "moe.output",
}
"""Modules and methods of a block of tinygrad/llm/model.py to the taps that they give."""
INPUTS = {
    "attn_output": "attention.context",
    "ffn_norm": "attention_residual",
    "ffn_down_exps": "expert.hidden",
}
"""Modules of a block to the taps that are their last argument."""
UNSEEN = ("attention.scores", "attention.probs")
STATES = ("embedding", "residual", "final_norm", "logits")
"""The taps that are seen between the blocks. Blocks then run as tinygrad compiles them, several operations in one."""
AMD = "tinygrad.llm.kernels.amd"
"""A module that tinygrad/llm/model.py imports, and that the wheel of 0.14.0 lacks. It has kernels for AMD's GPUs."""


class Adapter:
    """A `Transformer` of tinygrad's llm."""

    name = "tinygrad"
    dtypes = ("float32",)
    taps: tuple[str, ...] = tuple(tap for tap in TAPS if tap not in UNSEEN)
    abilities = ABILITIES
    policies = MappingProxyType({"float32": "tinygrad-float32"})
    options = MappingProxyType({
        "norm_key": Option("whether the GGUF file has the key expert_weights_norm", ("yes", "no")),
        "taps": Option("all, or those between the blocks, which tinygrad then compiles", ("all", "states")),
    })  # fmt: skip
    requirements = ("tinygrad==0.14.0", "gguf==0.19.0")

    def __init__(self, norm_key: str = "yes", taps: str = "all") -> None:
        self.norm_key = norm_key == "yes"
        if taps == "states":
            self.taps = STATES
        os.environ.update(DEV="CPU", HALF="0")  # HALF=0: weights stay float32
        needed("tinygrad", "tinygrad")
        needed("gguf", "tinygrad")
        without_amd()
        self.engine: Any = needed("tinygrad.llm.model", "tinygrad")
        self.version = version("tinygrad")

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Keep the checkpoint. Raises Skipped for a window: a file of a llama has none."""
        self.checkpoint = load_checkpoint(checkpoint)
        if self.checkpoint.config.window is not None:
            raise Skipped(f"tinygrad's llama has no window; this model's is {self.checkpoint.config.window}")

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each sequence on a model of its own, because a model of tinygrad holds one cache."""
        for run in runs:
            refuse_shifted("tinygrad", run)
        longest = max(run.past + len(run.tokens) for run in runs)
        tensor: Any = needed("tinygrad", "tinygrad").Tensor
        watch = Watch(self.checkpoint.config.head_dim, frozenset(taps))
        models: dict[int, Any] = {}
        inside = self.taps != STATES
        with Scratch("tinygrad") as scratch, watch.functions(self.engine) if inside else nullcontext():
            path = scratch.path / "model.gguf"
            self._write(path)
            for run in runs:
                watch.recorder.begin(run)
                if run.sequence not in models:
                    models[run.sequence], _ = self.engine.Transformer.from_gguf(str(path), max_context=longest)
                    if inside:
                        watch.wrap(models[run.sequence])
                model = models[run.sequence]
                x = model.token_embd(tensor([list(run.tokens)], dtype="int32")).float()
                watch.record("embedding", x)
                for i, block in enumerate(model.blk):
                    watch.layer = f"layers.{i}."
                    x = block(x, run.past).realize()
                    watch.record(f"layers.{i}.residual", x)
                normed = model.output_norm(x)
                watch.record("final_norm", normed)
                watch.record("logits", model.output(normed))
        return watch.recorder.arrays

    def _write(self, path: Path) -> None:
        """Write the GGUF file, with the key that llama.cpp's converter leaves out."""
        writer: Any = needed("gguf", "tinygrad").GGUFWriter
        add = writer.add_vocab_size

        def added(self_: Any, size: int) -> None:
            add(self_, size)
            self_.add_expert_weights_norm(True)

        with replaced(writer, "add_vocab_size", added) if self.norm_key else nullcontext():
            write_gguf(path, self.checkpoint.config, self.checkpoint.parameters)


def without_amd() -> None:
    """Stand in for the kernels of AMD's GPUs where the wheel lacks them. On a CPU none is called."""
    if find_spec("tinygrad.llm.kernels") is not None:
        return
    package, amd = ModuleType(AMD.rpartition(".")[0]), ModuleType(AMD)
    amd.Linear = needed("tinygrad.nn", "tinygrad").Linear  # type: ignore[attr-defined]
    amd.amd_custom_kernels_supported = lambda device: False  # type: ignore[attr-defined]
    amd.gated_delta_prefill = amd.flash_attention = None  # type: ignore[attr-defined]
    sys.modules[package.__name__], sys.modules[AMD] = package, amd


class Watch:
    """Records the taps of a model while it runs."""

    def __init__(self, head_dim: int, wanted: Collection[str]) -> None:
        """head_dim: d of the model.   wanted: taps without layer"""
        self.head_dim, self.wanted, self.recorder = head_dim, wanted, Recorder()
        self.layer = ""
        """The prefix of the taps of the layer that runs now."""
        self.rotated = cycle(("q_rope", "k_rope"))

    def wrap(self, model: Any) -> None:
        """Watch the modules of every block."""
        for block in model.blk:
            for name in OUTPUTS:
                setattr(block, name, self._wrapped(name, getattr(block, name)))

    @contextmanager
    def functions(self, engine: Any) -> Iterator[None]:
        """While the context lasts, three functions are watched too, and blocks run at once instead of being traced."""
        rotate, choose, tensor = engine.apply_rope, engine.pairwise_topk, engine.Tensor
        softmax, later = tensor.softmax, [False]

        def rope(*args: Any) -> Any:
            made = rotate(*args).realize()
            self.record(f"{self.layer}attention.{next(self.rotated)}", made.transpose(1, 2))
            return made

        def topk(*args: Any) -> Any:
            values, experts = choose(*args)
            self.record(f"{self.layer}router.experts", experts.realize())
            later[0] = True
            return values, experts

        def weigh(*args: Any, **kwargs: Any) -> Any:
            made = softmax(*args, **kwargs)
            if later[0]:
                self.record(f"{self.layer}router.weights", made.realize())
                later[0] = False
            return made

        def at_once(**_: Any) -> Callable[[Any], Any]:
            return lambda function: function

        with ExitStack() as stack:
            stack.enter_context(replaced(engine, "apply_rope", rope))
            stack.enter_context(replaced(engine, "pairwise_topk", topk))
            stack.enter_context(replaced(tensor, "softmax", weigh))
            stack.enter_context(replaced(engine, "function", at_once))
            yield

    def _wrapped(self, name: str, module: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name in INPUTS:
                self.record(f"{self.layer}{INPUTS[name]}", args[-1].realize())
            made = module(*args).realize()
            self.record(f"{self.layer}{OUTPUTS[name]}", made)
            return made

        return call

    def record(self, tap: str, value: Any) -> None:
        """Record a tap in its own shape.   value: [1, T, ...]"""
        step = step_of(tap)
        if step in self.wanted:
            array = value.numpy()[0]
            self.recorder(tap, array.reshape(len(array), -1, self.head_dim) if step in HEADED else array)
