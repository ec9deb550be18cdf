# SPDX-License-Identifier: Apache-2.0
"""Scores of an engine that counts positions from another start, where no value shows its start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.exact import elementary
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.steps import rounding as steps
from refmoe.steps.enclosure_ops import EnclosureOps
from tests.arithmetic.enclosure.legal import KINDS, LegalOps, draw
from tests.arithmetic.enclosure.test_steps import hold

THETA = 1e4
POLICIES = (
    "float32", "bfloat16", "float16", "float64", "hf-bfloat16", "gpt-fast-bfloat16", "float32+scale=query",
    "bfloat16+scale=query", "float32+cache=float16", "llama.cpp-float32-cache-float16", "bfloat16+rope.table=float32",
)  # fmt: skip


class Shifted(LegalOps):
    """A legal engine that adds `offset` to all positions. Its angles are as precise as without."""

    offset = 0

    def unit_circle(self, positions: Any, base: float, numerators: Any, denominator: int) -> Any:
        moved = np.asarray(positions) + self.offset
        cos, sin = (np.asarray(part) for part in elementary.unit_circle(moved, base, numerators, denominator))
        u = self.policy.statistics.u
        logarithms = np.asarray(numerators) / denominator * np.log(base)
        room = np.where(logarithms == 0, 0.0, u * (self.policy.angles.constant - 1 + logarithms))
        angle = np.asarray(positions)[:, None] * np.exp(-logarithms) * room * self.rng.uniform(-1, 1, cos.shape)
        noise = self.rng.uniform(-1, 1, (2, *cos.shape)) * u
        turned = (cos * np.cos(angle) - sin * np.sin(angle), sin * np.cos(angle) + cos * np.sin(angle))
        return tuple((part + n).astype(self.dtype) for part, n in zip(turned, noise, strict=True))


def scores(ops: Any, q: Any, k: Any) -> None:
    """Queries are the last tokens of all. q: [T, H, d]   k: [S, K, d]"""
    first = k.shape[0] - q.shape[0]
    rotated = []
    for x, positions, name in ((q, range(first, k.shape[0]), "q_rope"), (k, range(k.shape[0]), "k_rope")):
        table = steps.rotary_table(ops, np.asarray(positions), x.shape[-1], THETA)
        rotated.append(ops.tap(f"attention.{name}", steps.rotate(ops, x, table)))
    cache = steps.extend_cache(ops, None, rotated[1], rotated[1], np.arange(k.shape[0]))
    ops.tap("attention.scores", steps.scores_of(ops, rotated[0], cache.k))


def enclosed(q: Any, k: Any, p: Policy, any_offset: bool, spread: float = 0.0) -> tuple[Enclosure, EnclosureOps]:
    """The enclosure of the scores, of queries and keys that are off by up to `spread` of their size."""
    seen: dict[str, Enclosure] = {}
    ops = EnclosureOps(p, lambda name, x: seen.__setitem__(name, x))
    ops.any_offset = any_offset
    accumulation = p.accumulation
    if spread:
        wrapped = [Enclosure(x, spread * np.abs(x), (spread * x) ** 2 / 3, accumulation=accumulation) for x in (q, k)]
    else:
        wrapped = [Enclosure(x, accumulation=accumulation) for x in (q, k)]
    scores(ops, *wrapped)
    return seen["attention.scores"], ops


def found(q: Any, k: Any, p: Policy, rng: np.random.Generator, offset: int) -> Any:
    """The scores of one legal engine at this offset."""
    seen: dict[str, Any] = {}
    ops = Shifted(p, rng, lambda name, x: seen.__setitem__(name, np.asarray(x, np.float64)))
    ops.offset = offset
    with np.errstate(all="ignore"):
        scores(ops, ops.array(q), ops.array(k))
    return seen["attention.scores"]


def drawn(rng: np.random.Generator, kind: str, p: Policy) -> tuple[Any, Any]:
    d, tokens = int(rng.choice([2, 4, 10, 64])), int(rng.integers(1, 5))
    shapes = (tokens, 4, d), (tokens + int(rng.integers(0, 20)), 2, d)
    return draw(rng, kind, shapes[0], p.storage), draw(rng, "gaussian", shapes[1], p.storage)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    offset=st.one_of(st.integers(0, 5000), st.integers(0, 2**30)),
    spread=st.sampled_from([0.0, 0.0, 2.0**-12]),
)
def test_no_offset_makes_a_legal_score_fail(name: str, seed: int, kind: str, offset: int, spread: float) -> None:
    p, rng = policy(name), np.random.default_rng(seed)
    q, k = drawn(rng, kind, p)
    expected, ops = enclosed(q, k, p, any_offset=True, spread=spread)
    for _ in range(3):
        off = [x * (1 + spread * 0.999 * rng.uniform(-1, 1, x.shape)) for x in (q, k)]
        hold(expected, found(*off, p, rng, offset), "attention.scores", p, bool(ops.events), f"{name} {kind} {seed}")


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_an_offset_costs_little_sharpness(name: str, seed: int) -> None:
    """Of ordinary values: a radius at most three times that of the declared positions."""
    p, rng = policy(name), np.random.default_rng(seed)
    q, k = (draw(rng, "gaussian", (8, heads, 16), p.storage) for heads in (4, 2))
    wide, narrow = (enclosed(q, k, p, any_offset)[0].settle() for any_offset in (True, False))
    np.testing.assert_allclose(wide.mid, narrow.mid, rtol=0, atol=1e-12)
    assert np.median(wide.r / narrow.r) < 3
    assert np.median(np.sqrt(wide.v / narrow.v)) < 3
