# SPDX-License-Identifier: Apache-2.0
"""transformers' own Mixtral on a CPU, watched by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.adapters.transformers_batch import PaddedBatch
from refmoe.engines.capture import transformers as engine
from refmoe.engines.options import TORCH_THREADS, Option
from refmoe.engines.protocol import ABILITIES, DTYPES, TAPS
from refmoe.errors import InputError, require
from refmoe.traces.trace import Recorder, Run

EXPERTS = tuple(tap for tap in TAPS if tap.startswith("expert."))
AROUND = ("embedding", "residual", "final_norm", "logits")
"""The taps that a compiled layer does not hide."""
CODED = "-w8a8"
"""The end of the policy of a folder of compressed-tensors that declares codes of inputs."""
FLEX = "flex_attention"
ALIGNED = 16
"""torch's grouped_mm wants strides that are multiples of this number of bytes."""
ALIGNMENT = "https://github.com/pytorch/pytorch/issues/172440"


class Adapter:
    """`MixtralForCausalLM` on the CPU."""

    name = "transformers"
    abilities = ABILITIES
    options = MappingProxyType({
        "attention": Option(
            "the implementation of attention; transformers' own default is sdpa; torch.compile compiles flex_attention",
            ("eager", "sdpa", FLEX),
        ),
        "threads": TORCH_THREADS,
        "experts": Option(
            "the implementation of the experts; transformers' own default is grouped_mm",
            ("eager", "batched_mm", "grouped_mm"),
        ),
        "cache": Option("the cache of keys and values: one that grows, or one of a fixed size", ("dynamic", "static")),
        "batch": Option("a sequence by itself, or as the padded row of a batch of two", ("single", "left-padded")),
        "compile": Option("whether torch.compile compiles each layer; that takes a minute a case", ("off", "layers")),
    })  # fmt: skip
    requirements = ("torch==2.13.0", "transformers==5.23.0")

    def __init__(
        self,
        attention: str = "eager",
        threads: str = "1",
        experts: str = "eager",
        cache: str = "dynamic",
        batch: str = "single",
        compile: str = "off",
    ) -> None:
        """Raises InputError for options that exclude each other, or when torch or transformers is missing."""
        if batch != "single" and (cache != "dynamic" or compile != "off"):
            raise InputError(f"option batch is '{batch}', but with cache=static or compile=layers single was expected")
        torch = require("torch", "engines", "the adapter of transformers")
        torch.set_num_threads(int(threads))
        self.attention, self.experts, self.cache = attention, experts, cache
        self.padded, self.compiled = batch != "single", compile != "off"
        self.version: str = require("transformers", "engines", "the adapter of transformers").__version__
        narrow = experts == "grouped_mm" or attention == FLEX  # torch has no kernel in float64
        self.dtypes = tuple(dtype for dtype in DTYPES if not narrow or dtype != "float64")
        self.policies = {dtype: f"hf-{dtype}" for dtype in self.dtypes}
        self.taps = AROUND if self.compiled else tuple(tap for tap in TAPS if tap not in self._unseen())
        self.model: Any = None

    def _unseen(self) -> tuple[str, ...]:
        """The taps that no hook sees. A fused attention has no probabilities, and a static cache has more columns."""
        probs = () if self.attention == "eager" and self.cache == "dynamic" else ("attention.probs",)
        return ("attention.scores", *probs, *(EXPERTS if self.experts != "eager" else ()))

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a checkpoint of the Hugging Face layout. Raises Skipped for dims that grouped_mm does not take."""
        self.model = engine.load_model(checkpoint, dtype, self.attention, self.experts)
        self.policies[dtype] = f"hf-{dtype}" + (CODED if dtype == "float32" and codes_inputs(self.model) else "")
        config, size = self.model.config, self.model.dtype.itemsize
        widths = (config.hidden_size, config.intermediate_size)
        if self.experts == "grouped_mm" and any(width * size % ALIGNED for width in widths):
            raise Skipped(
                f"torch.nn.functional.grouped_mm takes rows of whole {ALIGNED} bytes; {widths[0]} and {widths[1]} "
                f"values of {dtype} are not", ALIGNMENT,
            )  # fmt: skip
        torch: Any = require("torch", "engines", "the adapter of transformers")
        if self.compiled or self.attention == FLEX:
            torch.compiler.reset()  # after 8 compilations of a function torch runs it uncompiled
        if self.compiled:
            layers = self.model.model.layers
            for i in range(len(layers)):
                layers[i] = torch.compile(layers[i], dynamic=True)

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Capture all runs, every tap that the hooks see. Raises Skipped for what the setting cannot do."""
        recorder = Recorder()
        if self.padded:
            PaddedBatch(self.model, recorder).run(runs)
            return recorder.arrays
        if self.cache == "static":
            refuse_cuts(runs)
        watching = engine.modules_alone if self.compiled else engine.hooks
        engine.capture(self.model, runs, recorder, self._new_cache(runs), watching)
        return {key: array for key, array in recorder.arrays.items() if not self._is_wider(key)}

    def _is_wider(self, key: str) -> bool:
        """Whether a value has columns for the unused cells of a static cache."""
        return self.cache == "static" and key.endswith("attention.probs")

    def _new_cache(self, runs: Sequence[Run]) -> Callable[[], Any]:
        """A maker of empty caches."""
        transformers: Any = require("transformers", "engines", "the adapter of transformers")
        if self.cache == "dynamic":
            return engine.growing_cache
        longest = max(run.past + len(run.tokens) for run in runs)
        # some cells stay unused, as in an engine that has allocated for the longest answer
        return lambda: transformers.StaticCache(config=self.model.config, max_cache_len=longest + 3)


def codes_inputs(model: Any) -> bool:
    """Whether any module simulates codes of its input, as compressed-tensors makes it do."""
    schemes = (getattr(module, "quantization_scheme", None) for module in model.modules())
    return any(scheme is not None and scheme.input_activations is not None for scheme in schemes)


def refuse_cuts(runs: Sequence[Run]) -> None:
    """Raises Skipped where a run begins with its cache cut, which a cache of a fixed size does not do."""
    seen: dict[int, int] = {}
    for run in runs:
        if run.past < seen.get(run.sequence, 0):
            raise Skipped(f"{run.run} begins with a cache that is cut, which StaticCache of transformers cannot be")
        seen[run.sequence] = run.past + len(run.tokens)
