# SPDX-License-Identifier: Apache-2.0
"""transformers' Mixtral, exported to ONNX and compiled by OpenVINO for a CPU.

By default OpenVINO computes in bfloat16 where the processor has instructions for it. Inputs and outputs are float32
even then.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.engines.adapter import Arrays
from refmoe.engines.adapters.onnx import GIVEN, run_graph
from refmoe.engines.adapters.onnx_export import EXPORTING, export
from refmoe.engines.environment import needed
from refmoe.engines.options import Option
from refmoe.engines.protocol import ABILITIES
from refmoe.files.scratch import Scratch
from refmoe.traces.trace import Run

FIRST = "+router_order=softmax-then-top-k"
"""The graph is that of transformers, in which a probability that underflows can no longer be chosen by its logit."""
POLICIES = {"f32": "openvino-float32", "bf16": f"bfloat16{FIRST}", "f16": f"float16{FIRST}"}
"""Per type that OpenVINO infers in the policy of its float32 arrays."""


class Adapter:
    """A compiled model with one thread."""

    name = "openvino"
    dtypes = ("float32",)
    abilities = ABILITIES
    options = MappingProxyType({
        "precision": Option("the hint INFERENCE_PRECISION_HINT; by default the processor decides", ("f32", "default")),
        "taps": Option("the outputs of the graph: OpenVINO fuses nothing across one", (*GIVEN,)),
    })  # fmt: skip
    requirements = (*EXPORTING, "openvino==2026.4.1")

    def __init__(self, precision: str = "f32", taps: str = "all") -> None:
        """Raises InputError when OpenVINO is missing."""
        self.openvino: Any = needed("openvino", "openvino")
        hints = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} if precision == "f32" else {}
        self.settings = {**hints, "INFERENCE_NUM_THREADS": 1}
        self.taps = GIVEN[taps]
        self.version = f"{version('openvino')} (torch {version('torch')}, transformers {version('transformers')})"
        used = "f32" if precision == "f32" else self._preferred()
        self.policies = {"float32": POLICIES[used]}

    def _preferred(self) -> str:
        """The name of the type that OpenVINO infers in on this processor, without a hint."""
        return str(self.openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name())

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Export the checkpoint to ONNX and compile it."""
        with Scratch("openvino") as scratch:
            path = scratch.path / "model.onnx"
            self.graph = export(checkpoint, dtype, self.taps, path)
            self.model = self.openvino.compile_model(str(path), "CPU", self.settings)

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Run each call with the cache of its sequence, cut to `past` tokens."""
        return run_graph(self.graph, runs, np.dtype(np.float32), self._call)

    def _call(self, given: list[NDArray[Any]]) -> list[NDArray[Any]]:
        made = self.model(given)
        return [np.array(made[i]) for i in range(len(self.model.outputs))]
