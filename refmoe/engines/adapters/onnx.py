# SPDX-License-Identifier: Apache-2.0
"""transformers' Mixtral, exported to ONNX and run by onnxruntime on a CPU.

Taps are outputs of the graph, and onnxruntime does not fuse operations across an output. With the option taps=logits
only the logits and the new cache are outputs, and all between may be fused. Scores are not seen: no module of
transformers returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.engines.adapter import Arrays
from refmoe.engines.adapters.onnx_export import EXPORTING, Graph, export
from refmoe.engines.capture.transformers import shaped
from refmoe.engines.options import Option
from refmoe.engines.protocol import TAPS
from refmoe.errors import require
from refmoe.files.scratch import Scratch
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder, Run

LEVELS = {
    "off": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL",
}  # fmt: skip
GIVEN = {"all": tuple(tap for tap in TAPS if tap != "attention.scores"), "logits": ("logits",)}


class Adapter:
    """An ONNX graph in a session of one thread."""

    name = "onnxruntime"
    dtypes = ("float32", "float64", "float16")
    abilities = ("chunk", "decode", "sequences")
    policies = MappingProxyType({"float32": "onnx-float32", "float64": "hf-float64", "float16": "onnx-float16"})
    options = MappingProxyType({
        "optimise": Option("onnxruntime's own changes to the graph", (*LEVELS,)),
        "taps": Option("the outputs of the graph: onnxruntime fuses nothing across one", (*GIVEN,)),
    })  # fmt: skip
    requirements = (*EXPORTING, "onnxruntime==1.32.0")

    def __init__(self, optimise: str = "all", taps: str = "all") -> None:
        self.ort: Any = require("onnxruntime", "onnx", "running an ONNX graph")
        self.optimise = getattr(self.ort.GraphOptimizationLevel, LEVELS[optimise])
        self.taps = GIVEN[taps]
        self.version = f"{version('onnxruntime')} (torch {version('torch')}, transformers {version('transformers')})"

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Export the checkpoint to ONNX and start a session of one thread."""
        options = self.ort.SessionOptions()
        options.graph_optimization_level = self.optimise
        options.intra_op_num_threads = 1
        with Scratch("onnx") as scratch:
            path = scratch.path / "model.onnx"
            self.graph = export(checkpoint, dtype, self.taps, path)
            self.session = self.ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.dtype = np.dtype(dtype)

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call with the cache of its sequence, cut to `past` tokens."""
        return run_graph(self.graph, runs, self.dtype, self._call)

    def _call(self, given: list[NDArray[Any]]) -> list[NDArray[Any]]:
        inputs = [value.name for value in self.session.get_inputs()]
        made: list[NDArray[Any]] = self.session.run(None, dict(zip(inputs, given, strict=True)))
        return made


def run_graph(
    graph: Graph,
    runs: Sequence[Run],
    dtype: np.dtype[Any],
    call: Callable[[list[NDArray[Any]]], list[NDArray[Any]]],
) -> Arrays:
    """Run each call of a graph with the cache of its sequence, cut to `past` tokens.

    dtype: of the cache   call: from the graph's inputs to its outputs, both in order
    """
    count, kv_heads, head_dim = graph.cache
    empty = [np.zeros((1, kv_heads, 0, head_dim), dtype)] * count
    caches: dict[int, list[NDArray[Any]]] = {}
    recorder = Recorder()
    for run in runs:
        recorder.begin(run)
        past = [part[:, :, : run.past] for part in caches.get(run.sequence, empty)]
        made = call([np.array([run.tokens]), np.array([run.positions]), *past])
        caches[run.sequence] = made[-count:]
        for tap, array in zip(graph.taps, made[:-count], strict=True):
            recorder(tap, shaped(tap, without_batch(tap, array), head_dim))
    return recorder.arrays


def without_batch(tap: str, array: NDArray[Any]) -> NDArray[Any]:
    """An output of the graph as the module gives it. What an expert makes may have a batch of one in front."""
    return array.reshape(array.shape[-3:]) if step_of(tap).startswith("expert.") else array
