# SPDX-License-Identifier: Apache-2.0
"""Each step under a policy: the results of a legal implementation are inside, and pass every test of the verifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import FORMATS, nearest
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.load import policy
from refmoe.profiles.policy import Policy
from refmoe.spec.attention import Cache
from refmoe.steps import rounding as steps
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.verifier.tally import Limits, Tally
from tests.arithmetic.enclosure.legal import KINDS, LegalOps, draw

POLICIES = (
    "float32", "bfloat16", "float16", "hf-float32", "hf-bfloat16", "hf-float16", "hf-float64", "gpt-fast-bfloat16",
    "float32+scale=query", "bfloat16+combine.partial=bfloat16", "llama.cpp-float32-cache-float16",
)  # fmt: skip
LIMIT = Limits(1e-6, 1_000_000, 100).excess

Inputs = dict[str, Any]


def weight(values: Any) -> Weight:
    return Weight("w", values.shape, np.dtype(np.float64), source=lambda: values, origin="w")


def norm(ops: Any, given: Inputs) -> None:
    ops.tap("moe_norm", steps.rms_norm(ops, given["x"], given["gain"], 1e-5))


def turn(ops: Any, given: Inputs) -> None:
    d = given["q"].shape[-1]
    table = steps.rotary_table(ops, given["positions"], d, 1e4)
    ops.tap("attention.q_rope", steps.rotate(ops, given["q"], table))


def attend(ops: Any, given: Inputs) -> None:
    k, v = given["k"], given["v"]
    cache = steps.extend_cache(ops, None, k, v, np.arange(k.shape[0]))
    past = k.shape[0] - given["q"].shape[0]
    mask = np.arange(k.shape[0])[None] <= np.arange(given["q"].shape[0])[:, None] + past
    steps.attend(ops, given["q"], Cache(cache.k, cache.v, cache.positions), mask)


def route(ops: Any, given: Inputs) -> None:
    logits = ops.tap("router.logits", ops.linear(given["x"], given["w"]))
    logits = steps.cut_again(ops, "router.softmax_input", "router.logits", logits)
    ops.tap("router.weights", ops.weigh(logits, given["experts"]))


def expert(ops: Any, given: Inputs) -> None:
    ops.tap("expert.hidden", ops.silu(given["x"]) * given["up"])


def project(ops: Any, given: Inputs) -> None:
    ops.tap("expert.gate", ops.linear(given["x"], given["w"]))


def combine(ops: Any, given: Inputs) -> None:
    ops.tap("moe.output", steps.combine(ops, given["outputs"], given["weights"]))


def residual(ops: Any, given: Inputs) -> None:
    ops.tap("residual", given["x"] + given["up"])


def inputs(step: Callable[..., None], rng: np.random.Generator, kind: str, p: Policy) -> Inputs:
    """The inputs of a step: arrays are activations, weights and integers are known exactly."""
    f, T, D = p.storage, int(rng.integers(1, 7)), int(rng.choice([1, 2, 3, 8, 20, 48]))
    if step in (norm, expert, project, residual):
        other = str(rng.choice(KINDS)) if kind not in ("huge", "tiny", "subnormal") else "gaussian"
        w = weight(draw(rng, other, (int(rng.integers(1, 6)), D), p.at("weights")))
        found = {"x": draw(rng, kind, (T, D), f), "up": draw(rng, other, (T, D), f), "w": w}
        return {**found, "gain": draw(rng, "gaussian", (D,), p.at("weights"))}
    if step is route:
        E, k = 5, int(rng.integers(1, 6))
        x, w = draw(rng, kind, (T, D), f), draw(rng, "gaussian", (E, D), p.at("weights"))
        experts = np.argsort(-(x @ w.T), axis=-1, kind="stable")[:, :k]
        return {"x": x, "w": weight(w), "experts": experts}
    if step is combine:
        k = int(rng.integers(1, 6))
        shares = rng.dirichlet(np.ones(k), T)
        return {"outputs": draw(rng, kind, (T, k, D), f), "weights": nearest(shares, p.at("router.weights"))}
    d = int(rng.choice([2, 4, 10, 64]))
    if step is turn:
        last = int(rng.choice([1, 255, 4095, 32767]))
        return {"q": draw(rng, kind, (T, 2, d), f), "positions": rng.integers(0, last + 1, T)}
    S = T + int(rng.integers(0, 20))
    q = draw(rng, kind, (T, 4, d), p.at("attention.q_rope"))
    k, v = draw(rng, "gaussian", (S, 2, d), p.at("cache.k")), draw(rng, kind, (S, 2, d), p.at("cache.v"))
    return {"q": q, "k": k, "v": v}


def activation(name: str, x: Any) -> bool:
    return name in ("x", "up", "q", "k", "v", "outputs", "weights")


def enclosures(step: Callable[..., None], given: Inputs, p: Policy, spread: float) -> tuple[Any, EnclosureOps]:
    """The enclosure of each tap, before its own rounding. Activations are off by up to `spread` of their size."""
    seen: dict[str, Enclosure] = {}
    ops = EnclosureOps(p, lambda name, x: seen.__setitem__(name, x))

    def wrap(x: Any) -> Enclosure:
        if not spread:
            return Enclosure(x, accumulation=p.accumulation)
        return Enclosure(x, spread * np.abs(x), (spread * x) ** 2 / 3, accumulation=p.accumulation)

    step(ops, {name: wrap(x) if activation(name, x) else x for name, x in given.items()})
    return seen, ops


def legal(step: Callable[..., None], given: Inputs, p: Policy, rng: np.random.Generator, spread: float) -> Any:
    """Each tap of one legal run on inputs that are off by up to `spread`."""
    seen: dict[str, Any] = {}
    ops = LegalOps(p, rng, lambda name, x: seen.__setitem__(name, np.asarray(x, np.float64)))

    def moved(x: Any) -> Any:
        if not spread:
            return ops.array(x)
        off = np.full(x.shape, float(rng.choice([-1, 1]))) if rng.random() < 0.2 else rng.uniform(-1, 1, x.shape)
        # rounding inwards: the moved value is one of the dtype
        return ops.array(x * (1 + spread * 0.999 * off))

    with np.errstate(all="ignore"):
        step(ops, {name: moved(x) if activation(name, x) else x for name, x in given.items()})
    return seen


def hold(x: Enclosure, found: Any, tap: str, p: Policy, overflows: bool, name: str) -> Tally:
    tally = Tally()
    dtype = FORMATS["float64" if p.accumulation.precision == 53 else "float32"]
    flat = x.map(lambda part: part.reshape(-1))
    with np.errstate(all="ignore"):
        tally.add(flat, found.reshape(-1), p.at(tap), dtype, lambda at: (at,), overflows)
    assert tally.outside == 0, f"{name}: {tap}: {tally.outside} of {found.size} outside: {tally.worst}"
    assert tally.excess < LIMIT, f"{name}: {tap}: excess {tally.excess}: {tally.worst}"
    return tally


STEPS = (norm, turn, attend, route, expert, project, combine, residual)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), spread=st.sampled_from([0.0, 0.0, 2.0**-12, 0.02]))
def test_no_legal_run_fails(name: str, step: Callable[..., None], seed: int, kind: str, spread: float) -> None:
    p, rng = policy(name), np.random.default_rng(seed)
    given = inputs(step, rng, kind, p)
    if spread and step is attend and kind == "huge":
        return  # such a softmax has no bound
    expected, ops = enclosures(step, given, p, spread)
    for _ in range(3):
        for tap, found in legal(step, given, p, rng, spread).items():
            if tap == "attention.scores" and kind == "huge":
                continue
            hold(expected[tap], found, tap, p, bool(ops.events), f"{name} {step.__name__} {kind} {seed} {spread}")
