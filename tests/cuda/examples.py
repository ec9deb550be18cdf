# SPDX-License-Identifier: Apache-2.0
"""For every kernel, fixed inputs for its law: small, of odd sizes, and chosen so that a one-line bug shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.cuda import laws
from tests.cuda.laws import Run
from tests.cuda.on_cpu import DTYPES, stored

Law = Callable[[Run], None]


def _routing(dtype: str) -> Iterator[Law]:
    rng = np.random.default_rng(3)
    for tokens, experts, k in ((5, 8, 2), (3, 40, 8), (2, 256, 4), (1, 3, 3), (9, 5, 1)):
        values = rng.integers(-3, 3, (tokens, experts)) + rng.integers(0, 2, (tokens, 1)) * 200.0
        yield lambda run, values=values, k=k: laws.route_law(run, values.astype(DTYPES[dtype]), k)  # type: ignore[misc]
    tiny = float(np.ldexp(1.0, -149 if dtype == "float32" else -133 if dtype == "bfloat16" else -24))
    special = np.array([[np.nan, -0.0, 0.0, -1.0, -np.inf], [np.nan, 0.0, tiny, 2 * tiny, -tiny]]).astype(DTYPES[dtype])
    yield lambda run: laws.route_law(run, special, 4)


def _permutation(_: str) -> Iterator[Law]:
    rng = np.random.default_rng(4)
    for pairs, experts in ((0, 3), (1, 1), (300, 8), (700, 200), (512, 2)):
        chosen = rng.integers(0, experts, (pairs, 1)).astype(np.int32)
        yield lambda run, chosen=chosen, experts=experts: laws.sort_law(run, chosen, experts)  # type: ignore[misc]


def _rows(dtype: str) -> Iterator[tuple[Any, Any, int, Any]]:
    rng = np.random.default_rng(5)
    for tokens, columns, k in ((4, 64, 2), (3, 21, 3), (2, 2051, 2), (3, 5, 1)):
        x, order = stored(rng, (tokens, columns), dtype), rng.permutation(tokens * k).astype(np.int32)
        yield rng, x, k, order


def _gathering(dtype: str) -> Iterator[Law]:
    for _, x, k, order in _rows(dtype):
        yield lambda run, x=x, order=order, k=k: laws.gather_law(run, x, order, k)  # type: ignore[misc]


def _combining(dtype: str) -> Iterator[Law]:
    for rng, x, k, order in _rows(dtype):
        outputs, weights = stored(rng, (len(order), x.shape[1]), dtype), rng.random((len(x), k)).astype(np.float32)
        position = np.argsort(order).astype(np.int32).reshape(len(x), k)
        yield lambda run, a=outputs, p=position, w=weights: laws.combine_law(run, a, p, w)  # type: ignore[misc]
    position = np.arange(40, dtype=np.int32).reshape(20, 2)
    halves = np.full((40, 9), 0.5).astype(DTYPES[dtype])
    halves[::2] = rng.integers(128, 256, (20, 9))  # in bfloat16 every sum is a tie
    yield lambda run: laws.combine_law(run, halves, position, np.ones((20, 2), np.float32))
    opposite = np.repeat(stored(rng, (20, 9), dtype), 2, axis=0) * np.resize([1, -1], (40, 1)).astype(DTYPES[dtype])
    both = np.repeat(rng.random((20, 1)).astype(np.float32), 2, axis=1)  # zero, unless a product is not rounded
    yield lambda run: laws.combine_law(run, opposite, position, both)


def _experts(dtype: str) -> Iterator[tuple[Any, ...]]:
    rng = np.random.default_rng(6)
    for experts, outputs, inputs, tokens, k in ((3, 9, 31, 2, 2), (4, 5, 264, 3, 2), (2, 17, 8, 1, 1)):
        w1, w3 = (stored(rng, (experts, outputs, inputs), dtype) for _ in range(2))
        chosen = (1 + rng.integers(0, experts - 1, (tokens, k))).astype(np.int32)
        yield w1, w3, stored(rng, (tokens, inputs), "float32"), stored(rng, (tokens, k, inputs), "float32"), chosen


def _hidden(dtype: str) -> Iterator[Law]:
    for w1, w3, x, _, chosen in _experts(dtype):
        yield lambda run, a=(w1, w3, x, chosen): laws.expert_hidden_law(run, *a)  # type: ignore[misc]


def _output(dtype: str) -> Iterator[Law]:
    for w2, _, _, hidden, chosen in _experts(dtype):
        yield lambda run, a=(w2, hidden, chosen): laws.expert_output_law(run, *a)  # type: ignore[misc]


def _normalising(dtype: str) -> Iterator[Law]:
    rng = np.random.default_rng(7)
    for rows, columns in ((2, 2100), (3, 33)):
        x = (rng.standard_normal((rows, columns)) * 2.0**-8).astype(DTYPES[dtype])
        gain = stored(rng, (columns,), dtype)
        yield lambda run, x=x, gain=gain: laws.rms_norm_law(run, x, gain, 1e-5)  # type: ignore[misc]


def _rotating(dtype: str) -> Iterator[Law]:
    rng = np.random.default_rng(8)
    for tokens, heads, half in ((2, 3, 16), (3, 2, 9), (4, 2, 3)):
        x, angles = stored(rng, (tokens, heads, 2 * half), dtype), rng.random((tokens, half)) * 7
        table = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
        yield lambda run, x=x, table=table: laws.rotate_law(run, x, *table)  # type: ignore[misc]
    x[..., half:] = x[..., :half]  # turned by 45 degrees the first half is zero, unless a product is not rounded
    yield lambda run: laws.rotate_law(run, x, table[0], table[0])


def _activating(dtype: str) -> Iterator[Law]:
    rng = np.random.default_rng(9)
    for rows, columns in ((2, 64), (3, 7), (1, 2049)):
        gate, up = (stored(rng, (rows, columns), dtype) for _ in range(2))
        yield lambda run, gate=gate, up=up: laws.swiglu_law(run, gate, up)  # type: ignore[misc]


_EXAMPLES: dict[str, Callable[[str], Iterator[Law]]] = {
    "route": _routing,
    "count_pairs": _permutation,
    "scan_counts": _permutation,
    "place_pairs": _permutation,
    "gather_rows": _gathering,
    "combine": _combining,
    "expert_hidden": _hidden,
    "expert_output": _output,
    "rms_norm": _normalising,
    "rotate": _rotating,
    "swiglu": _activating,
}


def examples(kernel: str, dtype: str) -> Iterator[Law]:
    """The law of a kernel on each of its inputs."""
    return _EXAMPLES[kernel](dtype)
