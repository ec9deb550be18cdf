# SPDX-License-Identifier: Apache-2.0
"""`golden/arithmetic.md` is enough to reproduce a golden's bits: followed here with Python's floats and fractions.

Nothing of `refmoe/spec` or `refmoe/arithmetic/exact/dot` is used. The elementary functions are taken from
`refmoe/arithmetic/exact/elementary`, which has an independent implementation, in C, in its own tests.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from refmoe.arithmetic.exact import elementary
from refmoe.checkpoints.names import named_weights
from refmoe.suite import read_case, trace_path
from refmoe.traces.trace import read_trace

FOLDER = Path(__file__).parent.parent / "golden" / "walking-skeleton"
TOKENS = 5
Vector = list[float]


def exact_sum(terms: Any) -> float:
    return float(sum(terms, Fraction(0)))


def product(x: Vector, matrix: list[list[Fraction]]) -> Vector:
    exact = [Fraction(value) for value in x]
    return [exact_sum(a * b for a, b in zip(exact, row, strict=True)) for row in matrix]


def function(name: str, x: Vector) -> Vector:
    return [float(value) for value in getattr(elementary, name)(np.array(x))]


def softmax(x: Vector) -> Vector:
    weight = function("exp", [value - max(x) for value in x])
    total = exact_sum(map(Fraction, weight))
    return [value / total for value in weight]


def norm(x: Vector, gain: Vector, eps: float) -> Vector:
    mean_square = exact_sum(Fraction(value * value) for value in x) / len(x)
    return [value / math.sqrt(mean_square + eps) * g for value, g in zip(x, gain, strict=True)]


def turned(head: Vector, position: int, theta: float) -> Vector:
    half = len(head) // 2
    cos, sin = (
        part[0].tolist()
        for part in elementary.unit_circle(np.array([position]), theta, range(0, len(head), 2), len(head))
    )
    first = [head[i] * cos[i] - head[i + half] * sin[i] for i in range(half)]
    return first + [head[i + half] * cos[i] + head[i] * sin[i] for i in range(half)]


def add(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def test_the_document_reproduces_the_bits_of_a_golden() -> None:
    """The first tokens of the prefill: every tap that ends a step, to the last bit."""
    case = read_case(FOLDER)
    c, trace = case.config, read_trace(trace_path(FOLDER))
    weights: dict[str, Any] = {}
    for name, weight in named_weights(case.checkpoint().parameters).items():
        values = np.asarray(weight.read(), np.float64).tolist()
        matrix = isinstance(values[0], list) and name != "embedding"
        weights[name] = [[Fraction(value) for value in row] for row in values] if matrix else values
    past: list[list[Any]] = [[] for _ in range(c.layers)]
    for t, token in enumerate(case.calls[0][2][:TOKENS]):

        def same(tap: str, values: Any, t: int = t) -> None:
            assert trace.get("prefill", tap)[t].ravel().tolist() == values, (t, tap)

        x: Vector = weights["embedding"][token]
        for i in range(c.layers):
            at = f"layers.{i}."
            x = layer(
                c, {k.removeprefix(at): v for k, v in weights.items() if k.startswith(at)}, x, t, past[i], at, same
            )
        same("logits", product(norm(x, weights["final_norm"], c.norm_eps), weights["output"]))


def layer(c: Any, w: dict[str, Any], x: Vector, position: int, past: list[Any], at: str, same: Any) -> Vector:
    d, share = c.head_dim, c.heads // c.kv_heads
    n = norm(x, w["attention_norm"], c.norm_eps)
    same(at + "attention_norm", n)
    q, k, v = (product(n, w[f"attention.w{name}"]) for name in "qkv")
    cut = [[row[h * d : (h + 1) * d] for h in range(len(row) // d)] for row in (q, k, v)]
    queries, keys = ([turned(head, position, c.rope_theta) for head in heads] for heads in cut[:2])
    same(at + "attention.q_rope", list(chain(*queries)))
    past.append((keys, cut[2]))
    context: Vector = []
    for h, query in enumerate(queries):
        scores = [product(query, [list(map(Fraction, entry[0][h // share]))])[0] / math.sqrt(d) for entry in past]
        probs = softmax(scores)
        columns = [[Fraction(entry[1][h // share][j]) for entry in past] for j in range(d)]
        context += product(probs, columns)
    same(at + "attention.context", context)
    x = add(x, product(context, w["attention.wo"]))
    same(at + "attention_residual", x)
    n = norm(x, w["moe_norm"], c.norm_eps)
    logits = product(n, w["router.gate"])
    chosen = sorted(range(c.experts), key=lambda e: (-logits[e], e))[: c.experts_per_token]
    same(at + "router.experts", chosen)
    mix = softmax([logits[e] for e in chosen])
    same(at + "router.weights", mix)
    outputs = []
    for e in chosen:
        gate, up = (product(n, w[f"experts.{e}.{name}"]) for name in ("w1", "w3"))
        hidden = [g * s * u for g, s, u in zip(gate, function("sigmoid", gate), up, strict=True)]
        outputs.append(product(hidden, w[f"experts.{e}.w2"]))
    same(at + "expert.output", list(chain(*outputs)))
    y = [exact_sum(Fraction(f[j] * m) for f, m in zip(outputs, mix, strict=True)) for j in range(c.dim)]
    same(at + "moe.output", y)
    x = add(x, y)
    same(at + "residual", x)
    return x
