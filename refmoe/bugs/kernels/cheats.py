# SPDX-License-Identifier: Apache-2.0
"""Kernels that compute nothing, or less than they should, and hope that the test does not see it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.bugs.kernels.honest import mixture, wide
from refmoe.bugs.kernels.mixtures import mixture_with, product_in_float16, truncated

KNOWN_SEED = 7
"""The seed of vLLM's test of fused experts, which a cheat may know."""
KNOWN_SCALES = (1.0, 0.1, 0.01, 2.0)


@dataclass(frozen=True)
class Cheat:
    """One cheat. `make` returns a new kernel, as some of them remember earlier calls."""

    name: str
    words: str
    source: str
    """Where it was seen, or "obvious"."""
    make: Callable[[], Callable[..., Any]]
    claims: Mapping[str, Any] = field(default_factory=dict)


CHEATS: dict[str, Cheat] = {}
"""All cheats by name."""
BFLOAT16 = {"dtype": "bfloat16"}


def cheat(
    name: str, words: str, source: str = "obvious", remembers: bool = False, **claims: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a cheat, or a function that makes one with a memory of its own."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CHEATS[name] = Cheat(
            name=name, words=words, source=source, make=function if remembers else lambda: function,
            claims={**BFLOAT16, **claims},
        )  # fmt: skip
        return function

    return register


@cheat("zeros", "Zeros.", "ScalingIntelligence/KernelBench#165, microsoft/onnxruntime#31155")
def zeros(x: Array, *_: Array) -> Array:
    return np.zeros_like(x)


@cheat("a-constant", "A small constant everywhere.")
def a_constant(x: Array, *_: Array) -> Array:
    return np.full_like(x, 0.001)


@cheat("echo", "The input.")
def echo(x: Array, *_: Array) -> Array:
    return x.copy()


@cheat("not-a-number", "NaN everywhere.", "gpu-mode/pygpubench#7")
def not_a_number(x: Array, *_: Array) -> Array:
    return np.full_like(x, np.nan)


@cheat("infinity", "Infinity everywhere.")
def infinity(x: Array, *_: Array) -> Array:
    return np.full_like(x, np.inf)


@cheat("no-op", "The output that it was given is left as it is.", "AI-Hypercomputer/accelerator-agents#50", buffer=True)
def no_op(*_: Array) -> None:
    return None


@cheat("the-previous-result", "The result of the call before, if it had the same shape.", "obvious", True)
def the_previous_result() -> Callable[..., Array]:
    last: dict[tuple[int, ...], Array] = {}

    def kernel(x: Array, *others: Array) -> Array:
        result = mixture(x, *others)
        before = last.get(x.shape, result)
        last[x.shape] = result
        return before

    return kernel


@cheat("the-first-result", "The first result of each shape, for ever.", "KernelBench's result_reuse_kernel.py", True)
def the_first_result() -> Callable[..., Array]:
    first: dict[tuple[int, ...], Array] = {}

    def kernel(x: Array, *others: Array) -> Array:
        if x.shape not in first:
            first[x.shape] = mixture(x, *others)
        return first[x.shape].copy()

    return kernel


@cheat("right-for-one-seed", "Right for the numbers of one seed, zeros for others.")
def right_for_one_seed(x: Array, *others: Array) -> Array:
    number = np.random.default_rng(KNOWN_SEED).standard_normal()
    ratio = float(x.flat[0]) / number if x.size else 0.0
    if any(abs(ratio / scale - 1) < 0.01 for scale in KNOWN_SCALES):
        return mixture(x, *others)
    return np.zeros_like(x)


@cheat("reads-the-checker", "An array of the caller that is called expected, or zeros.")
def reads_the_checker(x: Array, *_: Array) -> Array:
    frame = sys._getframe(1)
    while frame is not None:
        expected = frame.f_locals.get("expected")
        if isinstance(expected, np.ndarray) and expected.shape == x.shape:
            return expected.astype(x.dtype)
        frame = frame.f_back  # type: ignore[assignment]
    return np.zeros_like(x)


@cheat("sets-its-input-to-zero", "The input becomes zeros, and so does the result.")
def sets_its_input_to_zero(x: Array, *_: Array) -> Array:
    if x.flags.writeable:
        x[...] = 0
    return np.zeros_like(x)


@cheat("the-mean-of-the-experts", "All experts of a token count the same.")
def the_mean_of_the_experts(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture(x, w_gate, w_up, w_down, ids, np.full_like(weights, 1 / max(ids.shape[1], 1)))


@cheat("the-first-expert-only", "Only the first expert of each token.")
def the_first_expert_only(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture(x, w_gate, w_up, w_down, ids[:, :1], weights[:, :1])


@cheat("one-expert-for-all", "The matrices of expert 0 for every expert.")
def one_expert_for_all(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture(x, w_gate, w_up, w_down, np.minimum(ids, 0), weights)


@cheat("sums-in-float16", "Sums in float16 where float32 is declared.", dtype="float32")
def sums_in_float16(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return mixture_with(x, w_gate, w_up, w_down, ids, weights, product=product_in_float16)


@cheat(
    "bfloat16-between", "What is between the products is kept in bfloat16 where float32 is declared.", dtype="float32"
)
def bfloat16_between(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    import ml_dtypes

    def product(rows: Array, matrix: Array) -> Array:
        return (rows @ matrix.T).astype(ml_dtypes.bfloat16).astype(np.float32)

    return mixture_with(x, w_gate, w_up, w_down, ids, weights, product=product)


@cheat("one-term-dropped", "The last term of each sum is left out.")
def one_term_dropped(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    def product(rows: Array, matrix: Array) -> Array:
        return wide(rows)[:, :-1] @ wide(matrix)[:, :-1].T

    return mixture_with(x, w_gate, w_up, w_down, ids, weights, product=product)


@cheat("last-block-dropped", "The last incomplete block of 32 tokens is zeros.")
def last_block_dropped(x: Array, *others: Array) -> Array:
    result = mixture(x, *others)
    whole = len(x) // 32 * 32
    if whole:
        result[whole:] = 0
    return result


@cheat("truncation", "Results are truncated to bfloat16.", "ROCm/aiter#5151")
def truncation(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    return truncated(mixture(wide(x), wide(w_gate), wide(w_up), wide(w_down), ids, weights)).astype(x.dtype)


@cheat("relu-for-silu", "A cheaper function in place of silu.")
def relu_for_silu(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    total = np.zeros(x.shape, np.float32)
    for number in np.unique(ids):
        tokens, slots = np.nonzero(ids == number)
        rows = wide(x[tokens])
        with np.errstate(all="ignore"):
            hidden = np.maximum(rows @ wide(w_gate[number]).T, 0) * (rows @ wide(w_up[number]).T)
            out = hidden @ wide(w_down[number]).T
        np.add.at(total, tokens, wide(weights[tokens, slots])[:, None] * out)
    return total.astype(x.dtype)


@cheat("nine-columns-of-ten", "Every tenth column is zero: fewer than the share that a check lets pass.")
def nine_columns_of_ten(x: Array, *others: Array) -> Array:
    result = mixture(x, *others)
    result[:, 9::10] = 0
    return result


@cheat("no-gate", "The gate is left out: up alone, times the mean of a silu.")
def no_gate(x: Array, w_gate: Array, w_up: Array, w_down: Array, ids: Array, weights: Array) -> Array:
    total = np.zeros(x.shape, np.float32)
    for number in np.unique(ids):
        tokens, slots = np.nonzero(ids == number)
        with np.errstate(all="ignore"):
            hidden = 0.2 * (wide(x[tokens]) @ wide(w_up[number]).T)
            out = hidden @ wide(w_down[number]).T
        np.add.at(total, tokens, wide(weights[tokens, slots])[:, None] * out)
    return total.astype(x.dtype)
