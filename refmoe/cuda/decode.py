# SPDX-License-Identifier: Apache-2.0
"""Decoding in preallocated memory: no step allocates, and no step waits for the host.

The step is the specification's forward pass on one token, with the cache written in place. Token and position are
arrays on the device, so every token needs the same launches. They are recorded once as a CUDA graph, and the graph is
launched as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array, StoredWeight
from refmoe.arithmetic.formats import upcast
from refmoe.cuda.cupy_ops import CupyOps
from refmoe.errors import InputError
from refmoe.spec.attention import Cache
from refmoe.spec.model import Model, forward

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""From a step to a function that repeats the step at each call."""


class DecodeOps(CupyOps):
    """`CupyOps` whose constants, tables and vectors stay on the device after their first use."""

    def __init__(self, xp: Any, module: Any, capacity: int, gemm: Any = None) -> None:
        """capacity: the tables cover positions 0 .. capacity - 1.   gemm: as of `CupyOps`.

        No weight is ever dropped, because a recorded graph would continue to read its memory.
        """
        super().__init__(xp, module, np.float32, weight_bytes=1 << 62, gemm=gemm)
        self._capacity = capacity
        self._constants: dict[float, Array] = {}
        self._vectors: dict[int, tuple[StoredWeight, Array]] = {}
        self._tables: dict[Any, tuple[Array, Array]] = {}

    def array(self, values: Any) -> Array:
        if not isinstance(values, int | float):
            return super().array(values)
        if values not in self._constants:
            self._constants[values] = super().array(values)
        return self._constants[values]

    def vector(self, weight: StoredWeight) -> Array:
        if id(weight) not in self._vectors:
            self._vectors[id(weight)] = weight, super().vector(weight)
        return self._vectors[id(weight)][1]

    def embed(self, table: StoredWeight, ids: Array) -> Array:
        return upcast(self._rows(self.stored(table), ids), self.dtype)

    def unit_circle(self, positions: Array, base: float, numerators: Sequence[int], denominator: int) -> Any:
        key = (base, tuple(numerators), denominator)
        if key not in self._tables:
            every = np.arange(self._capacity)
            self._tables[key] = super().unit_circle(every, base, numerators, denominator)
        cosine, sine = self._tables[key]
        return self._rows(cosine, positions), self._rows(sine, positions)

    def _rows(self, table: Array, ids: Array) -> Array:
        """table[ids], by the kernel, which reads every stored dtype. table: [n, m]   ids: [T]   returns: [T, m]"""
        assert self.kernels is not None
        return self.kernels.gather_rows(table, ids.astype(np.int32), 1)


def extend_in_place(ops: Any, cache: Cache, k: Array, v: Array, positions: Array) -> Cache:
    """`refmoe.spec.attention.extend_cache` where slot s belongs to position s; later slots are masked by ATTN-3.

    cache: S_max slots   k, v: [T, K, d]   positions: integers [T]
    """
    cache.k[positions] = k
    cache.v[positions] = v
    return cache


class Decoder:
    """One sequence: the model, its preallocated cache, and the next token."""

    def __init__(self, ops: DecodeOps, model: Model, capacity: int, capture: Capture | None = None) -> None:
        """capacity: tokens that the cache has room for.   capture: `captured`, or None to launch kernels one by one."""
        xp, config = ops.xp, model.config
        self.ops, self.capacity, self._capture = ops, capacity, capture
        self.model = replace(model, steps=replace(model.steps, extend_cache=extend_in_place))
        slots, shape = xp.arange(capacity, dtype=np.int64), (capacity, config.kv_heads, config.head_dim)
        self.caches = tuple(
            Cache(xp.zeros(shape, ops.dtype), xp.zeros(shape, ops.dtype), slots) for _ in range(config.layers)
        )
        self.token, self.position = xp.zeros(1, np.int64), xp.zeros(1, np.int64)
        self.logits = xp.zeros((1, config.vocab), ops.dtype)
        self.past = 0
        self._launch: Callable[[], None] | None = None

    def read(self, tokens: Sequence[int]) -> Array:
        """Read several new tokens in one call. Returns the logits [1, V] after the last, whose largest comes next."""
        self._take_room(len(tokens))
        positions = self.ops.integers(range(self.past, self.past + len(tokens)))
        self._keep(self._forward(self.ops.integers(tokens), positions)[-1:])
        self.past += len(tokens)
        self.position[...] = self.past
        return self.logits

    def step(self, token: int | None = None) -> Array:
        """Read one token, by default the one of the largest logit before. Returns the logits [1, V] after it."""
        self._take_room(1)
        if token is not None:
            self.token[...] = token
        if self._launch is None:
            self._launch = self._step if self._capture is None else self._record(self._capture)
        self._launch()
        self.past += 1
        return self.logits

    def _step(self) -> None:
        """One step, which reads and writes only arrays at fixed addresses."""
        self._keep(self._forward(self.token, self.position))
        self.position += 1

    def _forward(self, tokens: Array, positions: Array) -> Array:
        ops: Any = self.ops  # its weights can be read, while those of the spec's `Ops` only have a shape
        logits, _ = forward(ops, self.model, tokens, positions, self.caches)
        return logits

    def _keep(self, logits: Array) -> None:
        self.logits[...] = logits
        self.token[...] = logits.argmax(axis=-1)

    def _record(self, capture: Capture) -> Callable[[], None]:
        """Record the step. Recording also runs it, to warm up, so token and position are restored afterwards."""
        kept = [(array, array.copy()) for array in (self.token, self.position)]
        launch = capture(self._step)
        for array, before in kept:
            array[...] = before
        return launch

    def _take_room(self, tokens: int) -> None:
        if self.past + tokens > self.capacity:
            raise InputError(f"the cache has room for {self.capacity} tokens, but {self.past + tokens} came")


def captured(cupy: Any, step: Callable[[], None]) -> Callable[[], None]:
    """The launches of a step as a graph, which is launched on a stream of its own.

    The step allocates from a pool of its own, so that no other code uses that memory between launches. The graph's
    stream and the default stream wait for each other, as CUDA's blocking streams do.
    """
    stream, pool = cupy.cuda.Stream(), cupy.cuda.MemoryPool()
    cupy.cuda.get_current_stream().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        step()  # compiles, uploads, and fills the pool
        stream.synchronize()
        stream.begin_capture()
        step()
        graph = stream.end_capture()

    def launch() -> None:
        assert pool is not None  # this closure keeps the pool alive as long as the graph
        graph.launch(stream)

    return launch


def can_capture(ops: CupyOps, model: Model) -> bool:
    """Whether no step waits for the host: the kernels can read the experts of every layer in place."""
    return ops.kernels is not None and all(ops.stacked(layer.experts) is not None for layer in model.parameters.layers)
