# SPDX-License-Identifier: Apache-2.0
"""The law of each kernel: its result has NumPy's bits where the arithmetic is stated, and is within a bound elsewhere.

A law calls one kernel through `run`, which tries every order of threads, and asserts. The tests of mutants use these
laws too. Bounds: u = 2^-24 per float32 operation, and expf within 2 ulp (CUDA C++ Programming Guide, table of standard
functions with the largest errors; glibc's is better).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import Array
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.cuda.kernels.calls import Kernels
from tests.cuda.on_cpu import DTYPES, HALF_STEP, SMALLEST_NORMAL, UNIT, chain, growth

Run = Callable[[Callable[[Kernels], Any]], Any]
OPS = NativeOps(np.float64)
EXP = 4 * UNIT
"""2 ulp of a float32, relative."""


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def same_bits(found: Array, expected: Array) -> bool:
    """Equal bit for bit, all NaNs being one."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    with np.errstate(invalid="ignore"):  # signalling NaNs may occur
        nan, found_nan = np.isnan(expected), np.isnan(found)
    return np.array_equal(found_nan, nan) and found[~nan].tobytes() == expected[~nan].tobytes()


def within(found: Array, expected: Array, relative: Any, absolute: Any = 0.0, dtype: str = "float32") -> None:
    """Assert that `found` is within these errors in float32, and one rounding to the dtype, of float64 `expected`."""
    assert np.isfinite(wide(found)).all()
    relative = relative + (0 if dtype == "float32" else HALF_STEP[dtype])
    bound = relative * np.abs(expected) + absolute + SMALLEST_NORMAL[dtype]
    worst = np.abs(wide(found) - expected) - bound * (1 + 2.0**-20)
    assert (worst <= 0).all(), f"off by {worst.max()} more than can be"


def route_law(run: Run, logits: Array, k: int) -> None:
    """The ids are NumPy's, and the weights are the softmax up to rounding."""
    chosen, weights = run(lambda kernels: kernels.route(logits, k))
    values = wide(logits)
    expected = OPS.top_k(values, k)
    assert np.array_equal(chosen, expected)
    rows = np.isfinite(OPS.gather(values, expected)).all(axis=-1)
    below = OPS.gather(values, expected)[rows]
    below = below - below[:, :1]
    exponentials = np.exp(below)
    spread = np.abs(below).max(axis=-1, keepdims=True, initial=0)
    # errors: each exponential has its argument's and its own; the sum has its terms' and k - 1 more; the quotient one
    error = 2 * (spread * UNIT + EXP) + (k + 1) * UNIT
    within(weights[rows], exponentials / exponentials.sum(axis=-1, keepdims=True), error)


def sort_law(run: Run, chosen: Array, experts: int) -> None:
    """The stable order, its inverse, and where each expert begins."""
    order, position, offsets = run(lambda kernels: kernels.sort_pairs(chosen, experts))
    expected, counts = OPS.group(chosen.reshape(-1), experts)
    assert np.array_equal(order, expected)
    assert np.array_equal(position.reshape(-1), OPS.inverse(expected))
    assert offsets.tolist() == [0, *np.cumsum(counts).tolist()]


def gather_law(run: Run, x: Array, order: Array, k: int) -> None:
    """The rows are equal bit for bit, also NaNs."""
    out = run(lambda kernels: kernels.gather_rows(x, order, k))
    assert out.tobytes() == x[order // k].tobytes()


def combine_law(run: Run, outputs: Array, position: Array, weights: Array) -> None:
    """The stated sum in float32, slot after slot, and one rounding."""
    out = run(lambda kernels: kernels.combine(outputs, position, weights))
    terms = weights[:, :, None] * outputs.astype(np.float32)[position]
    total = terms[:, 0]
    for slot in range(1, weights.shape[1]):
        total = total + terms[:, slot]
    assert same_bits(out, total.astype(outputs.dtype))


def products(w: Array, x: Array, chosen: Array) -> tuple[Array, Array]:
    """For every slot the product of its expert's matrix with its row, and the bound of a float32 sum's error.

    w: [E, m, n]   x: [T, k, n]   chosen: [T, k]   returns: two of float64 [T, k, m]
    """
    matrices, n = wide(w)[chosen], w.shape[-1]
    exact = np.einsum("tkmn,tkn->tkm", matrices, wide(x))
    size = np.einsum("tkmn,tkn->tkm", np.abs(matrices), np.abs(wide(x)))
    return exact, (growth(chain(n)) + n * 2.0**-52) * size


def activation(gate: Array, up: Array) -> tuple[Array, float, Array]:
    """silu(gate) * up in float64, and the relative and absolute errors in float32.

    Relative: exp, plus one, division, product. Absolute: exp overflows where the gate is below -88, and a subnormal
    number may be flushed before it is multiplied by `up`.
    """
    gate, up = wide(gate), wide(up)
    lost = SMALLEST_NORMAL["float32"] * (1 + np.abs(gate)) * np.abs(up)
    return gate / (1 + np.exp(-gate)) * up, EXP + 4 * UNIT, lost


def expert_hidden_law(run: Run, w1: Array, w3: Array, x: Array, chosen: Array) -> None:
    """Both products are within the bound of their sums, and the activation is that of the found products."""
    gate, up, hidden = run(lambda kernels: kernels.expert_hidden(w1, w3, x, chosen))
    rows = np.repeat(x[:, None], chosen.shape[1], axis=1)
    for found, w in ((gate, w1), (up, w3)):
        exact, bound = products(w, rows, chosen)
        assert (np.abs(wide(found) - exact) <= bound).all()
    within(hidden, *activation(gate, up))


def expert_output_law(run: Run, w2: Array, hidden: Array, chosen: Array) -> None:
    output = run(lambda kernels: kernels.expert_output(w2, hidden, chosen))
    exact, bound = products(w2, hidden, chosen)
    assert (np.abs(wide(output) - exact) <= bound).all()


def rms_norm_law(run: Run, x: Array, gain: Array, eps: float) -> None:
    """The squares have one sign, so the relative error of their sum is bounded. The root halves it."""
    out = run(lambda kernels: kernels.rms_norm(x, gain, eps))
    mean = (wide(x) ** 2).mean(axis=-1, keepdims=True)
    expected = wide(x) / np.sqrt(mean + float(np.float32(eps))) * wide(gain)
    within(out, expected, growth(chain(x.shape[1], 256) + 2) / 2 + 3 * UNIT, dtype=str(x.dtype))


def rotate_law(run: Run, x: Array, cosine: Array, sine: Array) -> None:
    """The spec's expression in float32, operation by operation, and one rounding."""
    out = run(lambda kernels: kernels.rotate(x, cosine, sine))
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(np.float32), x[..., half:].astype(np.float32)
    c, s = cosine[:, None], sine[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        expected = np.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(x.dtype)
    assert same_bits(out, expected)


def swiglu_law(run: Run, gate: Array, up: Array) -> None:
    out = run(lambda kernels: kernels.swiglu(gate, up))
    assert out.dtype == DTYPES[str(gate.dtype)]
    within(out, *activation(gate, up), str(gate.dtype))
