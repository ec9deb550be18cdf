# SPDX-License-Identifier: Apache-2.0
"""The kernels as functions of arrays: outputs are allocated here, arguments checked by `Kernel.launch`.

The kernels run wherever `xp` and `module` put them: CuPy and its RawModule, or NumPy and the CPU runner of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refmoe.arithmetic.arrays import Array
from refmoe.cuda.kernels import table
from refmoe.cuda.kernels.kernel import GetFunction, Kernel, blocks_of


class Kernels:
    """Every kernel, over one array module."""

    def __init__(self, xp: Any, module: Callable[[str], GetFunction]) -> None:
        """xp: numpy or cupy.   module: from the name of a `.cu` file to its functions by name expression."""
        self._xp = xp
        self._module = module

    def _launch(self, kernel: Kernel, **values: Any) -> None:
        kernel.launch(self._module(kernel.file), **values)

    def route(self, logits: Array, k: int) -> tuple[Array, Array]:
        """ROUTE-2 to ROUTE-4. logits: [T, E]   returns: expert ids, int32 [T, k], and weights, float32 [T, k]"""
        if k > logits.shape[1]:
            raise ValueError(f"route: {k} of {logits.shape[1]} experts")
        shape = (len(logits), k)
        chosen, weights = self._xp.empty(shape, "int32"), self._xp.empty(shape, "float32")
        self._launch(table.ROUTE, logits=logits, chosen=chosen, weights=weights)
        return chosen, weights

    def sort_pairs(self, chosen: Array, experts: int) -> tuple[Array, Array, Array]:
        """The (token, slot) pairs sorted stably by expert.

        chosen: int32 [T, k]
        returns: order [T k], position [T, k] with order[position[t, j]] = k t + j, and offsets [E + 1], where each
            expert's pairs begin; all int32
        """
        xp, pairs = self._xp, chosen.reshape(-1)
        starts = xp.empty((experts, max(1, blocks_of(pairs.size, table.PAIRS))), "int32")
        offsets, order, position = xp.empty(experts + 1, "int32"), xp.empty_like(pairs), xp.empty_like(pairs)
        self._launch(table.COUNT_PAIRS, chosen=pairs, counts=starts)
        self._launch(table.SCAN_COUNTS, counts=starts, offsets=offsets)
        self._launch(table.PLACE_PAIRS, chosen=pairs, starts=starts, order=order, position=position)
        return order, position.reshape(chosen.shape), offsets

    def gather_rows(self, x: Array, order: Array, k: int) -> Array:
        """x[order // k]. x: [T, D]   order: int32 [T k]   returns: [T k, D]"""
        out = self._xp.empty((len(order), x.shape[1]), x.dtype)
        self._launch(table.GATHER_ROWS, x=x, order=order, out=out, k=k)
        return out

    def combine(self, outputs: Array, position: Array, weights: Array) -> Array:
        """COMBINE-1. outputs: [T k, D]   position: int32 [T, k]   weights: float32 [T, k]   returns: [T, D]"""
        out = self._xp.empty((len(position), outputs.shape[1]), outputs.dtype)
        self._launch(table.COMBINE, outputs=outputs, position=position, weights=weights, out=out)
        return out

    def expert_hidden(self, w1: Array, w3: Array, x: Array, chosen: Array) -> tuple[Array, Array, Array]:
        """EXPERT-1 and EXPERT-2. w1, w3: [E, F, D]   x: float32 [T, D]   chosen: int32 [T, k]

        returns: gate, up and hidden, float32 [T, k, F]
        """
        gate, up, hidden = (self._xp.empty((*chosen.shape, w1.shape[1]), "float32") for _ in range(3))
        self._launch(table.EXPERT_HIDDEN, w1=w1, w3=w3, x=x, chosen=chosen, gate=gate, up=up, hidden=hidden)
        return gate, up, hidden

    def expert_output(self, w2: Array, hidden: Array, chosen: Array) -> Array:
        """EXPERT-1. w2: [E, D, F]   hidden: float32 [T, k, F]   chosen: int32 [T, k]   returns: float32 [T, k, D]"""
        output = self._xp.empty((*chosen.shape, w2.shape[1]), "float32")
        self._launch(table.EXPERT_OUTPUT, w2=w2, hidden=hidden, chosen=chosen, output=output)
        return output

    def rms_norm(self, x: Array, gain: Array, eps: float) -> Array:
        """NORM-1 to NORM-3. x: [T, D]   gain: [D]   returns: [T, D]"""
        out = self._xp.empty_like(x)
        self._launch(table.RMS_NORM, x=x, gain=gain, out=out, eps=eps)
        return out

    def rotate(self, x: Array, cosine: Array, sine: Array) -> Array:
        """ROPE-3 to ROPE-5. x: [T, heads, d]   cosine, sine: float32 [T, d/2]   returns: [T, heads, d]"""
        out = self._xp.empty_like(x)
        self._launch(table.ROTATE, x=x, cosine=cosine, sine=sine, out=out)
        return out

    def swiglu(self, gate: Array, up: Array) -> Array:
        """EXPERT-2. gate, up: [n, F]   returns: [n, F]"""
        out = self._xp.empty_like(gate)
        self._launch(table.SWIGLU, gate=gate.reshape(-1), up=up.reshape(-1), out=out.reshape(-1))
        return out
