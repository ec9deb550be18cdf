# SPDX-License-Identifier: Apache-2.0
"""Single products with an arithmetic of their own: a coarser input, or sums in another dtype than the other steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FORMATS, Format, nearest
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.cut_points import PROJECTIONS, ROW_PARALLEL
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.rounding import combine, context_of
from tests.arithmetic.enclosure.legal import KINDS, LegalOps, draw
from tests.arithmetic.enclosure.test_steps import hold

FLOAT16 = FORMATS["float16"]


def named(step: str, values: Any) -> Weight:
    return Weight(f"layers.0.{PROJECTIONS[step][0]}", values.shape, values.dtype, source=lambda: values, origin="w")


def added(terms: Any, format: Format, rng: np.random.Generator) -> Any:
    """The sum over the first axis in a random order; each product and each partial sum is rounded. terms: [n, ...]"""
    total = np.zeros(terms.shape[1:])
    for term in nearest(terms, format)[rng.permutation(len(terms))]:
        total = nearest(total + term, format)
    return total


def times(x: Any, w: Any, format: Format, rng: np.random.Generator) -> Any:
    """x [T, n] times w [m, n], transposed, with factors and sums in the format."""
    x, w = nearest(x, format), nearest(w, format)
    return added(np.moveaxis(x[:, None, :] * w[None], -1, 0), format, rng)


def enclosed(x: Any, step: str, w: Any, p: Policy) -> tuple[Enclosure, EnclosureOps]:
    ops = EnclosureOps(p)
    return ops.linear(Enclosure(x, accumulation=p.accumulation), named(step, w)), ops


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("step", PROJECTIONS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), low=st.sampled_from(["float16", "bfloat16", "float32"]))
def test_no_legal_sum_in_a_dtype_of_its_own_fails(name: str, step: str, seed: int, kind: str, low: str) -> None:
    p, rng = policy(f"{name}+{step}.accumulation={low}"), np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    x, w = draw(rng, kind, (4, n), p.storage), draw(rng, "gaussian", (5, n), p.storage)
    expected, ops = enclosed(x, step, w, p)
    with np.errstate(all="ignore"):
        found = nearest(times(x, w, FORMATS[low], rng), p.at(step))
    hold(expected, found, step, p, bool(ops.events), f"{name} {step} {kind} {seed}")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("step", PROJECTIONS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), low=st.sampled_from(["float16", "bfloat16"]))
def test_no_legal_product_of_a_coarser_input_fails(name: str, step: str, seed: int, kind: str, low: str) -> None:
    p, rng = policy(f"{name}+linear.input={low}"), np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    x, w = draw(rng, kind, (4, n), p.storage), draw(rng, "gaussian", (5, n), p.storage)
    expected, ops = enclosed(x, step, w, p)
    with np.errstate(all="ignore"):
        legal = LegalOps(p, rng)
        found = nearest(legal.matmul(nearest(x, FORMATS[low]), w.T), p.at(step))
    hold(expected, found, step, p, bool(ops.events), f"{name} {step} {kind} {seed}")


RANKED = (
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "float32+rank.partial=bfloat16",
    "bfloat16+combine.partial=float32",
)


def reduced(parts: list[Any], p: Policy, rng: np.random.Generator) -> Any:
    """The sum of stored parts in a random tree; an addition may round to the accumulation dtype before it is stored."""
    stored = p.at("rank.partial")
    left = [nearest(part, stored) for part in parts]
    while len(left) > 1:
        i, j = sorted(rng.choice(len(left), 2, replace=False))
        total = left[i] + left[j]
        total = nearest(nearest(total, p.accumulation) if rng.random() < 0.5 else total, stored)
        left = [part for at, part in enumerate(left) if at not in (i, j)] + [total]
    return left[0]


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("step", ROW_PARALLEL)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), ranks=st.integers(2, 9))
def test_no_sum_over_ranks_fails(name: str, step: str, seed: int, kind: str, ranks: int) -> None:
    p, rng = policy(f"{name}+ranks={ranks}"), np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    x, w = draw(rng, kind, (4, n), p.storage), draw(rng, "gaussian", (5, n), p.storage)
    expected, ops = enclosed(x, step, w, p)
    legal = LegalOps(p, rng)
    shares = [slice(r * n // ranks, (r + 1) * n // ranks) for r in range(ranks)]
    with np.errstate(all="ignore"):
        parts = [np.float64(legal.matmul(x[:, each], w[:, each].T)) for each in shares if each.start < each.stop]
        found = nearest(reduced(parts, p, rng), p.at(step))
    hold(expected, found, step, p, bool(ops.events), f"{name} {step} {kind} {seed} {ranks}")


@pytest.mark.parametrize("name", RANKED)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), ranks=st.integers(2, 9), k=st.integers(1, 6))
def test_no_sum_of_experts_over_ranks_fails(name: str, seed: int, kind: str, ranks: int, k: int) -> None:
    """Each expert is on some rank. A rank adds its own in the accumulation dtype, and the ranks' parts are reduced."""
    p, rng = policy(f"{name}+ranks={ranks}"), np.random.default_rng(seed)
    outputs, shares = draw(rng, kind, (4, k, 6), p.storage), nearest(rng.dirichlet(np.ones(k), 4), p.storage)
    ops = EnclosureOps(p)
    inputs = [Enclosure(each, accumulation=p.accumulation) for each in (outputs, shares)]
    expected = combine(ops, *inputs)
    owner, parts = rng.integers(0, ranks, k), []
    with np.errstate(all="ignore"):
        weighted = nearest(outputs * shares[:, :, None], p.accumulation)
        for rank in range(ranks):
            part = np.zeros((4, 6))
            for slot in np.flatnonzero(owner == rank):
                part = nearest(part + weighted[:, slot], p.accumulation)
            parts.append(part)
        found = nearest(reduced(parts, p, rng), p.at("moe.output"))
    hold(expected, found, "moe.output", p, bool(ops.events), f"{name} {kind} {seed} {ranks} {k}")


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.1, 1.0, 10.0]), keys=st.integers(1, 60))
def test_no_flash_attention_with_float16_sums_fails(seed: int, spread: float, keys: int) -> None:
    """As llama.cpp does it: key by key, the sum is rescaled whenever a score is the largest so far."""
    p, rng = policy("float32+cache=float16+attention.context.accumulation=float16"), np.random.default_rng(seed)
    scores = np.float32(rng.standard_normal((1, 3, keys)) * spread)
    v = draw(rng, "gaussian", (keys, 1, 4), FLOAT16)
    ops = EnclosureOps(p)
    probs = ops.cut("attention.probs", ops.softmax(Enclosure(np.float64(scores), accumulation=p.accumulation), None))
    expected = context_of(ops, probs, Enclosure(v, accumulation=p.accumulation))
    sums, total, top = np.zeros((3, 4)), np.zeros((3, 1), np.float32), np.full((3, 1), -np.inf, np.float32)
    for key in range(keys):
        now = np.maximum(top, scores[0, :, key : key + 1])
        scale, weight = np.exp(top - now), np.exp(scores[0, :, key : key + 1] - now)
        sums = nearest(sums * scale, FLOAT16)
        sums = nearest(sums + weight * v[key], FLOAT16)
        total, top = total * scale + weight, now
    found = np.float32(sums / total)[:, None]
    hold(expected, np.float64(found), "attention.context", p, bool(ops.events), f"{seed}")


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS))
def test_no_silu_in_float32_of_a_float64_engine_fails(seed: int, kind: str) -> None:
    """Cast, silu in float32, cast back, times up in float64."""
    cuts = "+".join(f"{cut}=float32" for cut in ("expert.sigmoid", "expert.silu", "expert.silu.accumulation"))
    p, rng = policy(f"float64+{cuts}"), np.random.default_rng(seed)
    gate, up = (draw(rng, kind, (4, 30), FORMATS["float64"]) for _ in range(2))
    if kind in ("tiny", "subnormal"):
        gate, up = gate * 2.0**900, up * 2.0**900  # float32 would have neither
    ops = EnclosureOps(p)
    silu = ops.silu(Enclosure(gate, accumulation=p.accumulation))
    expected = silu * Enclosure(up, accumulation=p.accumulation)
    legal = LegalOps(policy("float32"), rng)
    with np.errstate(all="ignore"):
        found = np.float64(legal.silu(np.float32(gate))) * up
    hold(expected, found, "expert.hidden", p, bool(ops.events), f"{kind} {seed}")


@pytest.mark.parametrize("change", ["attention.context.accumulation=float16", "router.logits.input=float16"])
@pytest.mark.parametrize("step", PROJECTIONS)
def test_other_steps_stay_as_sharp_as_they_are(step: str, change: str) -> None:
    if change.startswith(f"{step}."):
        return
    rng = np.random.default_rng(1)
    x, w = draw(rng, "gaussian", (4, 30), FORMATS["float32"]), draw(rng, "gaussian", (5, 30), FORMATS["float32"])
    before, after = (enclosed(x, step, w, policy(name))[0] for name in ("float32", f"float32+{change}"))
    np.testing.assert_array_equal(before.r, after.r)
    np.testing.assert_array_equal(before.v, after.v)
