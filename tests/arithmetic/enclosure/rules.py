# SPDX-License-Identifier: Apache-2.0
"""The rules by name, as functions of ops, so that balls, engines and enclosures compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flint
import numpy as np

from refmoe.arithmetic.ball import BallOps
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from refmoe.spec.norm import rms_norm
from refmoe.spec.softmax import softmax
from tests.arithmetic.enclosure.legal import LegalOps

BALL = BallOps()
FORMATS = (BFLOAT16, FLOAT16, FLOAT32, FLOAT64)
NAMES = ("float32", "bfloat16", "float16", "float64", "hf-bfloat16")


def total_probs(ops: Any, x: Any, y: Any) -> Any:
    return softmax(ops, x) if isinstance(ops, BallOps) else ops.softmax(x, None)


def log_softmax(ops: Any, x: Any, y: Any) -> Any:
    return ops.log(softmax(ops, x)) if isinstance(ops, BallOps) else ops.log_softmax(x)


def silu(ops: Any, x: Any, y: Any) -> Any:
    return x * ops.sigmoid(x) if isinstance(ops, BallOps) else ops.silu(x)


def mean(ops: Any, x: Any, y: Any) -> Any:
    """An engine may multiply by the inverse, which it holds rounded."""
    return x * ops.dtype.type(1 / 11) if isinstance(ops, LegalOps) else x / 11


def normed(ops: Any, x: Any, y: Any) -> Any:
    """An engine may multiply by an inverse root that is off by almost 2 ulp."""
    if not isinstance(ops, LegalOps):
        return y / ops.sqrt(x * x + 1.0)
    inverse = 1 / np.sqrt(np.asarray(x * x + ops.dtype.type(1), np.float64))
    return y * (inverse * (1 + ops.rng.choice([-3.4, 3.4]) * ops.policy.accumulation.u)).astype(x.dtype)


RULES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "sum": lambda ops, x, y: x + y,
    "difference": lambda ops, x, y: x - y,
    "product": lambda ops, x, y: x * y,
    "square": lambda ops, x, y: x * x,
    "quotient": lambda ops, x, y: x / y,
    "constant": lambda ops, x, y: (x + 1e-5) * 1.1 / 3,
    "scaled": lambda ops, x, y: x * 1.1,
    "mean": mean,
    "normed": normed,
    "root": lambda ops, x, y: ops.sqrt(x * x),
    "small root": lambda ops, x, y: ops.sqrt(x * x + 1e-30),
    "exp": lambda ops, x, y: ops.exp(x),
    "sigmoid": lambda ops, x, y: ops.sigmoid(x),
    "silu": silu,
    "softmax": total_probs,
    "log_softmax": log_softmax,
    "accumulate": lambda ops, x, y: ops.sum(x, axis=-1) if isinstance(ops, BallOps) else ops.accumulate(x, axis=1),
    "total": lambda ops, x, y: ops.sum(x, axis=-1),
    "matmul": lambda ops, x, y: ops.matmul(x, y.transpose(1, 0)),
    "rms_norm": lambda ops, x, y: rms_norm(ops, x, np.ones(1), 1e-5),
}
SCALES = {"exp": 20.0, "sigmoid": 100.0, "silu": 100.0, "softmax": 100.0, "log_softmax": 100.0}
"""The largest arguments that these functions are tried at."""


def exact(points: Any) -> Any:
    """Balls of radius zero. points: [..., 2], a midpoint and an offset, which are added."""
    total = np.frompyfunc(lambda a, b: flint.arb(a) + flint.arb(b), 2, 1)(*points)
    return np.asarray(total, object).reshape(points[0].shape)


def inside(x: Enclosure, balls: Any) -> bool:
    """Whether mid - radius <= the real number <= mid + radius, each of which Arb knows to 128 bits."""
    radii = np.broadcast_to(x.r, x.shape).reshape(-1).tolist()
    for mid, radius, ball in zip(x.mid.reshape(-1).tolist(), radii, balls.reshape(-1), strict=True):
        if radius < float("inf") and not (ball - flint.arb(mid)).abs_upper() <= flint.arb(radius) * (1 + 2.0**-60):
            return False
    return True
