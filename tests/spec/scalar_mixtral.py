# SPDX-License-Identifier: Apache-2.0
"""A second Mixtral, written from the papers with loops over plain Python floats: no array, no ops, no shared code.

Slow and obvious. It is the independent engine that the spec is held against; where the two differ, one is wrong.
"""

from __future__ import annotations

import cmath
import math
from typing import Any

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def times(matrix: list[Vector], x: Vector) -> Vector:
    return [dot(row, x) for row in matrix]


def rms(x: Vector, gain: Vector, eps: float) -> Vector:
    scale = math.sqrt(dot(x, x) / len(x) + eps)
    return [g * value / scale for g, value in zip(gain, x, strict=True)]


def softmax(x: Vector) -> Vector:
    weight = [math.exp(value - max(x)) for value in x]
    return [value / math.fsum(weight) for value in weight]


def turned(head: Vector, position: int, theta: float) -> Vector:
    """Each pair (i, i + d/2) as a complex number, times exp(i angle)."""
    half = len(head) // 2
    pairs = [
        complex(head[i], head[i + half]) * cmath.exp(1j * position * theta ** (-2 * i / len(head))) for i in range(half)
    ]
    return [pair.real for pair in pairs] + [pair.imag for pair in pairs]


def expert(w1: Any, w2: Any, w3: Any, x: Vector) -> Vector:
    hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(times(w1, x), times(w3, x), strict=True)]
    return times(w2, hidden)


def chosen(logits: Vector, k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:k]


def run(config: Any, weights: dict[str, Any], tokens: list[int], positions: list[int]) -> dict[str, list[Any]]:
    """Every token in turn over lists of past keys and values: logits, hidden states and experts per layer."""
    past: list[list[tuple[int, list[Vector], list[Vector]]]] = [[] for _ in range(config.layers)]
    seen: dict[str, list[Any]] = {"logits": []}
    for token, position in zip(tokens, positions, strict=True):
        x = list(weights["embedding"][token])
        for i in range(config.layers):
            w = {name.removeprefix(f"layers.{i}."): value for name, value in weights.items()}
            x = layer(config, w, x, position, past[i], seen, i)
        normed = rms(x, weights["final_norm"], config.norm_eps)
        seen["logits"].append(times(weights["output"], normed))
    return seen


def layer(config: Any, w: Any, x: Vector, position: int, past: list[Any], seen: Any, i: int) -> Vector:
    d = config.head_dim
    normed = rms(x, w["attention_norm"], config.norm_eps)
    q, k, v = (times(w[f"attention.w{name}"], normed) for name in "qkv")
    heads = [turned(q[h * d : (h + 1) * d], position, config.rope_theta) for h in range(config.heads)]
    keys = [turned(k[h * d : (h + 1) * d], position, config.rope_theta) for h in range(config.kv_heads)]
    past.append((position, keys, [v[h * d : (h + 1) * d] for h in range(config.kv_heads)]))
    context: Vector = []
    for h, head in enumerate(heads):
        kv = h // (config.heads // config.kv_heads)
        reach = [entry for entry in past if config.window is None or position - entry[0] < config.window]
        probs = softmax([dot(head, entry[1][kv]) / math.sqrt(d) for entry in reach])
        context += [math.fsum(p * entry[2][kv][j] for p, entry in zip(probs, reach, strict=True)) for j in range(d)]
    x = [a + b for a, b in zip(x, times(w["attention.wo"], context), strict=True)]
    seen.setdefault(f"layers.{i}.attention_residual", []).append(x)
    normed = rms(x, w["moe_norm"], config.norm_eps)
    logits = times(w["router.gate"], normed)
    picked = chosen(logits, config.experts_per_token)
    seen.setdefault(f"layers.{i}.router.experts", []).append(picked)
    for weight, e in zip(softmax([logits[e] for e in picked]), picked, strict=True):
        output = expert(*(w[f"experts.{e}.{name}"] for name in ("w1", "w2", "w3")), normed)
        x = [a + weight * b for a, b in zip(x, output, strict=True)]
    seen.setdefault(f"layers.{i}.residual", []).append(x)
    return x
