# SPDX-License-Identifier: Apache-2.0
"""Record the inputs and outputs of the modules of mlx-lm's Mixtral."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from refmoe.engines.capture.names import tap_of
from refmoe.engines.capture.patching import replaced
from refmoe.engines.capture.shapes import HEADED
from refmoe.errors import require
from refmoe.spec.taps import step_of
from refmoe.traces.trace import Recorder

NAMES = {
    "model.embed_tokens:out": "embedding",
    "model.layers.{i}.input_layernorm:out": "attention_norm",
    "model.layers.{i}.self_attn.q_proj:out": "attention.q",
    "model.layers.{i}.self_attn.k_proj:out": "attention.k",
    "model.layers.{i}.self_attn.v_proj:out": "attention.v",
    "model.layers.{i}.self_attn.o_proj:in0": "attention.context",
    "model.layers.{i}.self_attn.o_proj:out": "attention.output",
    "model.layers.{i}.post_attention_layernorm:in0": "attention_residual",
    "model.layers.{i}.post_attention_layernorm:out": "moe_norm",
    "model.layers.{i}.block_sparse_moe.gate:out": "router.logits",
    "model.layers.{i}.block_sparse_moe.switch_mlp:in1": "router.experts",
    "model.layers.{i}.block_sparse_moe.switch_mlp.gate_proj:out": "expert.gate",
    "model.layers.{i}.block_sparse_moe.switch_mlp.up_proj:out": "expert.up",
    "model.layers.{i}.block_sparse_moe.switch_mlp.down_proj:in0": "expert.hidden",
    "model.layers.{i}.block_sparse_moe.switch_mlp.down_proj:out": "expert.output",
    "model.layers.{i}.block_sparse_moe:out": "moe.output",
    "model.layers.{i}:out": "residual",
    "model.norm:out": "final_norm",
    "lm_head:out": "logits",
}
"""Names of mlx_lm/models/mixtral.py, `Model`, to taps, as in `refmoe.engines.capture.names`. in1 is argument 1."""


class Watch:
    """Records the taps of a model while it runs."""

    def __init__(self, head_dim: int) -> None:
        """head_dim: d of the model."""
        self.head_dim = head_dim
        self.start = 0
        """The position of a sequence's first token."""
        self.layer = ""
        """The prefix of the taps of the layer that runs now."""
        self.sorted: Any = None
        """Per slot the index of its row among the rows that `SwitchGLU` has sorted by expert."""
        self.chosen: tuple[int, ...] = ()
        """The shape of the choice of experts, [T, k]."""
        self.begin(())

    def begin(self, taps: Collection[str]) -> None:
        """Start a new recording.   taps: names without layer"""
        self.recorder, self.wanted = Recorder(), frozenset(taps)
        self.rotated = cycle(("q_rope", "k_rope"))

    def add(self, name: str, module: Any) -> None:
        """Watch a module. Its class is replaced, because Python looks up ``__call__`` in the class."""
        kind, around = type(module), self._rotate if name.endswith(".rope") else self._around

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(name, partial(kind.__call__, self), *args, **kwargs)

        module.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    @contextmanager
    def functions(self) -> Iterator[None]:
        """While the context lasts, two functions are watched too: softmax and the sorting of rows by expert."""
        mx: Any = require("mlx.core", "mlx", "running mlx-lm")
        switch: Any = require("mlx_lm.models.switch_layers", "mlx", "running mlx-lm")
        softmax, gather_sort = mx.softmax, switch._gather_sort

        def weigh(*args: Any, **kwargs: Any) -> Any:
            weights = softmax(*args, **kwargs)
            self._record(f"{self.layer}router.weights", weights)
            return weights

        def sort(*args: Any) -> Any:
            made = gather_sort(*args)
            self.sorted = np.array(made[2])
            return made

        with replaced(mx, "softmax", weigh), replaced(switch, "_gather_sort", sort):
            yield

    def _around(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a module and record its arguments and its result."""
        if name.startswith("model.layers."):
            self.layer = f"layers.{name.split('.')[2]}."
        is_sorted = kwargs.get("sorted_indices", False)
        for i, given in enumerate(args):
            self._record(tap_of(NAMES, f"{name}:in{i}"), given, is_sorted)
        made = call(*args, **kwargs)
        self._record(tap_of(NAMES, f"{name}:out"), made, is_sorted)
        return made

    def _rotate(self, _name: str, call: Callable[..., Any], x: Any, offset: int) -> Any:
        """Record rotated queries and keys; in each layer queries come first.   x: [1, heads, T, d]"""
        made = call(x, offset=self.start + offset)
        self._record(f"{self.layer}attention.{next(self.rotated)}", made.transpose(0, 2, 1, 3))
        return made

    def _record(self, tap: str | None, value: Any, is_sorted: bool = False) -> None:
        """Record a tap in its own shape.

        value: [1, ...], or a row for each slot.   is_sorted: whether the rows are sorted by expert.
        """
        if tap is None:
            return
        array = np.array(value)
        step = step_of(tap)
        if step.startswith("expert."):
            rows = array.reshape(-1, array.shape[-1])  # [T k, n]
            array = (rows[self.sorted] if is_sorted else rows).reshape(*self.chosen, -1)
        else:
            array = array[0]
            if step == "router.experts":
                self.chosen = array.shape
            elif step in HEADED:
                array = array.reshape(len(array), -1, self.head_dim)
        if step in self.wanted:
            self.recorder(tap, array)
