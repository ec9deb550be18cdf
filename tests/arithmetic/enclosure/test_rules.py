# SPDX-License-Identifier: Apache-2.0
"""Each rule against mathematics: Arb computes the function at points of the input intervals, and the results lie
inside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refmoe.arithmetic.enclosure.array import OWN, Enclosure
from refmoe.arithmetic.formats import nearest
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from tests.arithmetic.enclosure.legal import KINDS, LegalOps, draw
from tests.arithmetic.enclosure.rules import BALL, NAMES, RULES, SCALES, exact, inside


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15)
@example(seed=1544, kind="subnormal", spread=0.01)  # a divisor whose radius is below the smallest normal value
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), spread=st.sampled_from([0.0, 2.0**-20, 0.01, 0.7]))
def test_a_rule_contains_the_function_of_every_point(name: str, rule: str, seed: int, kind: str, spread: float) -> None:
    p, rng = policy(name), np.random.default_rng(seed)
    scale = SCALES.get(rule)
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, 9)))
    x, y = draw(rng, kind, shape, p.storage), draw(rng, str(rng.choice(KINDS)), shape, p.storage)
    if scale:
        x = np.clip(x, -scale, scale)
    if rule == "quotient":
        y = np.where(y == 0, 1.0, y)
    if rule == "softmax" and rng.random() < 0.3:
        x[..., 0] = 60.0  # one probability near 1
    radii = [spread * np.abs(part) * rng.choice([0, 1, 1], part.shape) for part in (x, y)]
    ops = EnclosureOps(p)
    given = [Enclosure(m, r, r**2 / 3, accumulation=p.accumulation) for m, r in zip((x, y), radii, strict=True)]
    found = RULES[rule](ops, *given)
    for _ in range(3):
        offs = [r * rng.choice([-1.0, 1.0, 0.5, 0.0, 0.999], r.shape) for r in radii]
        points = [exact(np.array([m, off])) for m, off in zip((x, y), offs, strict=True)]
        assert inside(found, RULES[rule](BALL, *points)), (rule, name, kind, spread)


@pytest.mark.parametrize(
    "name",
    [
        "float32", "float32+flushes=true", "float32+sigmoid=absolute",
        "bfloat16+expert.sigmoid=bfloat16+expert.silu=float32+logprobs.sum=bfloat16", "hf-float64",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_contains_its_own_rounding_and_gives_it_a_spread(name: str, rule: str, kind: str) -> None:
    """The arithmetic of the accumulator, without storage, whose roundings would hide others. Every radius has a
    variance:
    errors stay within a few standard deviations, whatever their source."""
    p, rng = policy(name), np.random.default_rng(1)
    scale = SCALES.get(rule)
    for _ in range(4):
        x, y = draw(rng, kind, (50, 8), p.storage), draw(rng, str(rng.choice(KINDS)), (50, 8), p.storage)
        if scale is not None:
            x = nearest(np.clip(x * rng.choice([1, 30]), -scale, scale), p.statistics)
        y = np.where(y == 0, 1.0, y) if rule == "quotient" else y
        ops, engine = EnclosureOps(p), LegalOps(p, rng)
        given = [Enclosure(part, accumulation=p.accumulation) for part in (x, y)]
        expected = RULES[rule](ops, *given).settle()
        for _ in range(4):
            with np.errstate(all="ignore"):
                found = np.asarray(RULES[rule](engine, engine.array(x), engine.array(y)), np.float64)
                error = np.abs(found - expected.mid)
                known = np.isfinite(expected.mid) & np.isfinite(np.broadcast_to(expected.r, expected.shape))
                assert (error <= expected.r)[known].all()
                sigmas = error / np.sqrt(expected.v + (OWN * expected.mid) ** 2)
            assert (sigmas < 8)[known & (error > 0)].all(), np.nanmax(sigmas[known])


@pytest.mark.parametrize("relative", [1e-4, 0.02])
@pytest.mark.parametrize("rule", RULES)
def test_a_variance_is_no_less_than_that_of_normal_errors(rule: str, relative: float) -> None:
    """A thousand draws of the inputs, in float64, whose own roundings are negligible."""
    p, rng = policy("float64"), np.random.default_rng(1)
    x, y = rng.standard_normal((2, 3, 5)) * 2
    x[0, 0] = -1.2784645427610738  # the slope of silu is 0 there
    sigmas = [relative * (0.1 + np.abs(part)) for part in (x, y)]
    ops, engine = EnclosureOps(p), LegalOps(p, rng)
    given = [Enclosure(m, 9 * s, s**2, accumulation=p.accumulation) for m, s in zip((x, y), sigmas, strict=True)]
    expected = RULES[rule](ops, *given)
    results = [
        RULES[rule](engine, *(m + s * rng.standard_normal(m.shape) for m, s in zip((x, y), sigmas, strict=True)))
        for _ in range(1000)
    ]
    error = np.mean((np.array(results) - expected.mid) ** 2, axis=0)
    assert (error <= 1.2 * expected.v).all(), (error / expected.v).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), spread=st.sampled_from([2.0**-20, 0.01, 0.7]))
def test_wider_inputs_give_wider_results(name: str, rule: str, seed: int, kind: str, spread: float) -> None:
    p, rng = policy(name), np.random.default_rng(seed)
    x, y = draw(rng, kind, (3, 5), p.storage), draw(rng, str(rng.choice(KINDS)), (3, 5), p.storage)
    ops, before = EnclosureOps(p), None
    for wider in (0, 1, 1.3, 4):
        parts = [
            Enclosure(m, wider * spread * np.abs(m), (wider * spread * m) ** 2 / 3, accumulation=p.accumulation)
            for m in (x, y)
        ]
        found = RULES[rule](ops, *parts)
        if before is not None:
            known = ~np.isnan(found.mid)
            assert (np.broadcast_to(found.r, found.shape) >= before.r * (1 - 1e-12))[known].all()
        before = found
