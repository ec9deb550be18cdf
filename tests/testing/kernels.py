# SPDX-License-Identifier: Apache-2.0
"""Honest kernels in plain NumPy: factors in a stored dtype, sums in float32 or wider, one rounding at the end."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = ("float32", "float16", "bfloat16", "float64")


def dtype(name: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def wide(x: Any) -> Any:
    """The values in the dtype of sums: float32, or float64 for float64."""
    return x.astype(np.float64 if x.dtype == np.float64 else np.float32)


def drawn(rng: np.random.Generator, *shape: int, name: str = "float32", scale: Any = 1.0) -> Any:
    return (scale * rng.standard_normal(shape)).astype(dtype(name))


def linear(x: Any, w: Any) -> Any:
    return (wide(x) @ wide(w).T).astype(x.dtype)


def silu(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swiglu(gate: Any, up: Any) -> Any:
    return (silu(wide(gate)) * wide(up)).astype(gate.dtype)


def rms_norm(x: Any, gain: Any, eps: float) -> Any:
    y = wide(x)
    return (y / np.sqrt((y * y).mean(-1, keepdims=True) + y.dtype.type(eps)) * wide(gain)).astype(x.dtype)


def rotary(x: Any, positions: Any, theta: float, interleaved: bool = False) -> Any:
    y, half = wide(x), x.shape[-1] // 2
    frequency = (theta ** -(np.arange(half) / half)).astype(y.dtype)
    angle = (positions[:, None].astype(y.dtype) * frequency)[:, None]
    cos, sin, found = np.cos(angle), np.sin(angle), np.empty_like(y)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b = y[..., first], y[..., second]
    found[..., first], found[..., second] = a * cos - b * sin, b * cos + a * sin
    return found.astype(x.dtype)


def attention(q: Any, k: Any, v: Any, mask: Any, scale: float | None = None) -> tuple[Any, Any]:
    """The output [T, H, d] and its log-sum-exp [T, H]."""
    y, group = wide(q), q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found, logs = np.empty((*q.shape[:2], v.shape[-1]), y.dtype), np.empty(q.shape[:2], y.dtype)
    for head in range(q.shape[1]):
        scores = np.where(mask, y[:, head] @ wide(k[:, head // group]).T * y.dtype.type(scale), -np.inf)
        top = scores.max(-1)
        logs[:, head] = top + np.log(np.exp(scores - top[:, None]).sum(-1))
        found[:, head] = softmax(scores) @ wide(v[:, head // group])
    return found.astype(q.dtype), logs


def combine(outputs: Any, weights: Any) -> Any:
    return (wide(outputs) * weights[..., None].astype(wide(outputs).dtype)).sum(1).astype(outputs.dtype)


def moe(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any, activation: Any = silu) -> Any:
    """The layer, with the hidden row stored in the dtype of x."""
    found = np.zeros(x.shape, wide(x).dtype)
    for token, slot in np.argwhere(ids >= 0):
        e, row = ids[token, slot], wide(x[token])
        hidden = (activation(wide(w_gate[e]) @ row) * (wide(w_up[e]) @ row)).astype(x.dtype)
        found[token] += weights[token, slot].astype(found.dtype) * (wide(w_down[e]) @ wide(hidden))
    return found.astype(x.dtype)


def layer(rng: np.random.Generator, tokens: int, size: int, hidden: int, experts: int, k: int, name: str) -> Any:
    """The arguments of `moe`, with different experts for each token."""
    x = drawn(rng, tokens, size, name=name)
    gate, up = (drawn(rng, experts, hidden, size, name=name, scale=size**-0.5) for _ in range(2))
    down = drawn(rng, experts, size, hidden, name=name, scale=hidden**-0.5)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]
    return x, gate, up, down, ids, softmax(rng.standard_normal((tokens, k)).astype(np.float32))
