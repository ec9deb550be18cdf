# SPDX-License-Identifier: Apache-2.0
"""The cost of exactness: correctly rounded products and native float64 products, in turns on the same data.

python bench/test_dot_cost.py     prints one line per case: milliseconds, the ratio, and the share of the exact path
pytest bench/test_dot_cost.py     checks the goals: at most 4 times native for synthetic weights, 8 for Gaussian ones
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.exact import dot
from refmoe.arithmetic.formats import upcast

SHAPES = {"w1": (14336, 4096), "w2": (4096, 14336)}
FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True)
class Cost:
    """Medians in seconds; `fallback` counts the elements that took the exact path in one call."""

    exact: float
    native: float
    fallback: int
    elements: int
    prepare: float = 0.0

    @property
    def ratio(self) -> float:
        return self.exact / self.native


def synthetic(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Odd integers in [-255, 255] times a power of two, as in refmoe/checkpoints/synthetic.py: bfloat16."""
    integers = rng.integers(0, 256, shape, np.int16) * 2 - 255
    return np.asarray(integers.astype(ml_dtypes.bfloat16) / ml_dtypes.bfloat16(8192))


def gaussian(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Normal variates in bfloat16."""
    return (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)


def compare(exact: Callable[[], Array], native: Callable[[], Array], rounds: int) -> Cost:
    """Time two computations of the same values, in turns."""
    taken = 0
    spent: tuple[list[float], list[float]] = ([], [])
    exact_dot = dot.exact_dot

    def counted(a: Array, b: Array) -> float:
        nonlocal taken
        taken += 1
        return exact_dot(a, b)

    dot.exact_dot = counted
    try:
        elements = exact().size
    finally:
        dot.exact_dot = exact_dot
    native()
    for _ in range(rounds):
        for run, times in zip((exact, native), spent, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return Cost(statistics.median(spent[0]), statistics.median(spent[1]), taken, elements)


def linear_cost(stored: Array, tokens: int, rounds: int) -> Cost:
    start = time.perf_counter()
    prepared = dot.prepare(stored)
    prepare = time.perf_counter() - start
    wide = upcast(stored, FLOAT64)
    x = np.random.default_rng(1).standard_normal((tokens, stored.shape[1]))
    cost = compare(lambda: dot.linear(x, prepared), lambda: x @ wide.T, rounds)
    return Cost(exact=cost.exact, native=cost.native, fallback=cost.fallback, elements=cost.elements, prepare=prepare)


def attention_cost(rounds: int) -> Cost:
    """Scores of 32 heads, 64 tokens, head_dim 128."""
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((32, 64, 128)), rng.standard_normal((32, 128, 64))
    return compare(lambda: dot.matmul(q, k), lambda: q @ k, rounds)


def sum_cost(rounds: int) -> Cost:
    """Mean squares of 64 tokens, dim 4096."""
    x = np.random.default_rng(3).standard_normal((64, 4096)) ** 2
    return compare(lambda: dot.sum(x, -1), lambda: x.sum(-1), rounds)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("weights", "goal"), [(synthetic, 4), (gaussian, 8)])
def test_full_size_linear_stays_within_its_goal(name: str, weights: Callable[..., Array], goal: float) -> None:
    cost = linear_cost(weights(np.random.default_rng(0), SHAPES[name]), tokens=8, rounds=5)
    assert cost.ratio <= goal, cost


def main() -> None:
    def line(name: str, cost: Cost) -> None:
        print(
            f"{name:34} exact {cost.exact * 1e3:9.3f} ms   native {cost.native * 1e3:9.3f} ms   ratio {cost.ratio:6.2f}"
            f"   fallback {cost.fallback} of {cost.elements}   prepare {cost.prepare * 1e3:7.1f} ms",
            flush=True,
        )

    for weights in (synthetic, gaussian):
        for name, shape in SHAPES.items():
            stored = weights(np.random.default_rng(0), shape)
            for tokens, rounds in ((1, 5), (8, 9), (64, 3)):
                line(f"{name} {weights.__name__} T={tokens}", linear_cost(stored, tokens, rounds))
        for tokens in (1, 20):
            stored = weights(np.random.default_rng(0), (128, 64))
            line(f"[128, 64] {weights.__name__} T={tokens}", linear_cost(stored, tokens, 200))
    line("scores, 32 heads T=64 d=128", attention_cost(30))
    line("sum of squares [64, 4096]", sum_cost(100))


if __name__ == "__main__":
    main()
