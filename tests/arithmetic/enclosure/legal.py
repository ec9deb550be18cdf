# SPDX-License-Identifier: Apache-2.0
"""Legal runs of a policy in real float32, float64, bfloat16 and float16 arithmetic: any order, fusion and rounding.

Each operation draws how it is done. Nothing here knows an enclosure.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refmoe.arithmetic.arrays import ArrayOps
from refmoe.arithmetic.formats import nearest
from refmoe.profiles.cut_points import STATISTICS
from refmoe.profiles.policy import Policy

SCHEMES = ("blas", "sequential", "permuted", "fused", "lanes", "tree", "wide")
KINDS = ("gaussian", "outliers", "lognormal", "one-signed", "blocks", "tiny", "huge", "subnormal", "zeros")


def draw(rng: np.random.Generator, kind: str, shape: Any, format: Any) -> Any:
    """Random values of the format, of one kind, as a float64 array."""
    x = rng.standard_normal(shape)
    if kind == "outliers":
        x = rng.standard_t(2, shape)
    elif kind == "lognormal":
        x = rng.lognormal(0, 2, shape) * rng.choice([-1, 1], shape)
    elif kind == "one-signed":
        x = np.abs(x)
    elif kind == "blocks":
        x = np.where(np.arange(shape[-1]) < shape[-1] // 2, 1.0, -1.0) * (1 + np.abs(x) / 50)
    elif kind == "tiny":
        x = x * format.tiny * 2.0**9
    elif kind == "huge":
        x = x * (2.0**6 if format.name == "float16" else 2.0**30)
    elif kind == "subnormal":
        x = x * format.tiny / 4
    elif kind == "zeros":
        x = x * (rng.random(shape) < 0.5)
    return nearest(x, format)


def truncated_sum(terms: Any, block: int) -> Any:
    """A sum as in tensor cores: align a block and the sum so far to the largest exponent, cut, add, cut. terms:
    [n, ...]"""
    total = np.zeros(terms.shape[1:])
    for start in range(0, len(terms), block):
        part = np.concatenate([total[None], terms[start : start + block]])
        step = np.ldexp(1.0, np.maximum(np.frexp(np.abs(part).max(0))[1] - 24, -149))
        total = (np.trunc(part / step) * step).sum(0)
        step = np.ldexp(1.0, np.maximum(np.frexp(np.abs(total))[1] - 24, -149))
        total = np.trunc(total / step) * step
    return total


class LegalOps(ArrayOps):
    """Ops of one legal implementation of a policy, drawn at random."""

    def __init__(self, policy: Policy, rng: np.random.Generator, tap: Any = None) -> None:
        super().__init__(policy.accumulation.dtype, tap)
        self.policy, self.rng = policy, rng
        self.stat = policy.statistics.dtype

    def _maybe(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    # ---- storing

    def cut(self, name: str, x: Any) -> Any:
        work = self.stat if name in STATISTICS else self.dtype
        format = self.policy.at(name)
        if self._maybe(0.6):
            x = nearest(x, format)
        return np.asarray(x).astype(work)

    def tap(self, name: str, x: Any) -> Any:
        if x.dtype.kind != "f":
            return super().tap(name, x)
        return super().tap(name, nearest(x, self.policy.at(name)).astype(self.dtype))

    def vector(self, weight: Any) -> Any:
        return self.array(weight.read())

    # ---- sums

    def linear(self, x: Any, weight: Any) -> Any:
        return self.matmul(x, self.array(weight.read()).T)

    def matmul(self, a: Any, b: Any) -> Any:
        a, b = self.array(a), self.array(b)
        tiny = self.policy.accumulation.tiny
        flush = self.policy.flushes and self._maybe()
        if flush:
            a, b = (np.where(np.abs(part) < tiny, self.dtype.type(0), part) for part in (a, b))
        left = np.moveaxis(a[..., :, :, None], -2, 0)  # [n, ..., l, 1]
        right = np.moveaxis(b[..., :, None, :], -3, 0)  # [n, ..., 1, m]
        scheme = self.rng.choice([*SCHEMES, *["truncating"] * (3 * self.policy.truncates)])
        if scheme == "truncating":
            terms = left.astype(np.float64) * right.astype(np.float64)
            result = self.array(truncated_sum(terms, int(self.rng.choice([4, 8, 16]))))
        elif scheme == "blas":
            result = a @ b
        elif scheme == "wide":
            result = self.array((left.astype(np.longdouble) * right.astype(np.longdouble)).sum(0))
        elif scheme == "fused":
            result = self.array(np.zeros(np.broadcast_shapes(left.shape, right.shape)[1:]))
            for x, y in zip(left, right, strict=True):
                result = self.array(x.astype(np.longdouble) * y.astype(np.longdouble) + result)
        else:
            result = self._sum(left * right, scheme)
        return np.where(np.abs(result) < tiny, self.dtype.type(0), result) if flush else result

    def _sum(self, terms: Any, scheme: str) -> Any:
        """Sum over the first axis in the dtype of the terms, each addition rounded."""
        n = len(terms)
        if scheme == "permuted":
            terms = terms[self.rng.permutation(n)]
        if scheme == "lanes":
            lanes = int(self.rng.choice([2, 4, 8]))
            return self._sum(np.stack([self._sum(terms[i::lanes], "sequential") for i in range(min(lanes, n))]), "tree")
        if scheme == "tree" and n > 1:
            return self._sum(terms[: n // 2], scheme) + self._sum(terms[n // 2 :], scheme)
        total = np.zeros_like(terms[0])
        for term in terms:
            total = total + term
        return total

    def sum(self, x: Any, axis: int) -> Any:
        terms = np.moveaxis(x, axis, 0)
        scheme = str(self.rng.choice(["sequential", "permuted", "lanes", "tree", "wide"]))
        if scheme == "wide":
            return terms.astype(np.longdouble).sum(0).astype(x.dtype)
        return self._sum(terms, scheme)

    def accumulate(self, x: Any, axis: int) -> Any:
        terms = np.moveaxis(x, axis, 0)[self.rng.permutation(x.shape[axis])]
        total = terms[0]
        for i, term in enumerate(terms[1:]):
            total = (total if i == 0 else self.cut("combine.partial", total)) + term
        return total

    # ---- functions

    def _erring(self, values: Any, x: Any, unit: float) -> Any:
        """Values of exp or sigmoid with any error that the budget allows, the last rounding included."""
        budget = self.policy.exp
        room = np.maximum(unit * (budget.constant - 1 + budget.slope * np.minimum(np.abs(x), 700)), 0.0)
        noise = self.rng.choice([0.0, 1.0, -1.0]) if self._maybe() else self.rng.uniform(-1, 1, x.shape)
        return values * (1 + noise * room)

    def _exp(self, x: Any) -> Any:
        if self._maybe(0.3):
            return np.exp(x)
        return self._erring(np.exp(x.astype(np.float64)), x, self.policy.statistics.u).astype(x.dtype)

    def exp(self, x: Any) -> Any:
        return self._exp(x)

    def _sigmoid(self, x: Any) -> Any:
        one = self.dtype.type(1)
        e = self._erring(np.exp(-x.astype(np.float64)), x, self.policy.accumulation.u).astype(self.dtype)
        if self.policy.sigmoid == "relative":
            return one / (one + e)
        budget = self.policy.exp.constant * self.policy.accumulation.u
        return (one / (one + e) + self.rng.uniform(-budget, budget, x.shape)).astype(self.dtype)

    def sigmoid(self, x: Any) -> Any:
        return self._sigmoid(x)

    def softmax(self, x: Any, mask: Any) -> Any:
        x = np.asarray(x).astype(self.stat)
        visible = np.broadcast_to(True if mask is None else mask, x.shape)
        top = np.where(visible, x, -np.inf).max(-1, keepdims=True)
        e = np.where(visible, self._exp(np.where(visible, x - top, self.stat.type(0))), self.stat.type(0))
        total = self.sum(e, -1)[..., None]
        return (e / total if self._maybe() else e * (1 / total)).astype(self.dtype)

    def log_softmax(self, x: Any) -> Any:
        """As a difference of logits, from the logarithm of the whole sum, or of each probability that is normal."""
        x = np.asarray(x).astype(self.stat)
        top = x.max(-1, keepdims=True)
        e = self._exp(x - top)
        total = self.cut("logprobs.sum", self.sum(e, -1)[..., None])
        apart = x - top - self.cut("logprobs.sum", self._log(total))
        scheme = self.rng.choice(["difference", "whole", "probability"])
        if scheme == "whole":
            return x - (top + self._log(total))
        normal = (e / total >= self.policy.statistics.tiny) & (scheme == "probability")
        return np.where(normal, self._log(np.where(normal, e / total, self.stat.type(1))), apart)

    def _log(self, x: Any) -> Any:
        """Logarithms with any error that the budget allows: that of exp at the result, the last rounding included."""
        exact = np.log(np.asarray(x, np.float64))
        return (exact + self._erring(np.ones_like(exact), exact, self.policy.statistics.u) - 1).astype(self.stat)

    def silu(self, x: Any) -> Any:
        one = self.dtype.type(1)
        if self._maybe(0.3):
            return self.cut("expert.silu", x / (one + np.exp(-x)))
        return self.cut("expert.silu", x * self.cut("expert.sigmoid", self._sigmoid(x)))

    def weigh(self, logits: Any, experts: Any) -> Any:
        if self._maybe():
            return self.softmax(self.gather(logits, experts), None)
        probs = self.gather(self.cut("router.probs", self.softmax(logits, None)), experts)
        total = self.cut("router.probs", self.sum(probs, -1))[:, None]
        return (probs / total).astype(self.dtype)

    def sqrt(self, x: Any) -> Any:
        return np.sqrt(x if np.ndim(x) else self.dtype.type(x))

    def unit_circle(self, positions: Any, base: float, numerators: Any, denominator: int) -> Any:
        stat = self.stat.type
        exponents = (np.asarray(numerators, np.float64) / denominator).astype(stat)
        frequency = stat(1) / stat(base) ** exponents if self._maybe() else stat(base) ** -exponents
        angles = (np.asarray(positions).astype(stat)[:, None] * frequency).astype(np.float64)
        noise = self.rng.uniform(-1, 1, (2, *angles.shape)) * self.policy.statistics.u
        return tuple(
            (part + n).astype(self.dtype) for part, n in zip((np.cos(angles), np.sin(angles)), noise, strict=True)
        )
