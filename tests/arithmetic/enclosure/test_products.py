# SPDX-License-Identifier: Apache-2.0
"""Long sums: legal ones are inside and not improbable, and faults of an accumulator are seen."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import accumulators
from bench import enclosures as bench
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.matrices import Matrix
from refmoe.arithmetic.enclosure.narrow import matrix_of
from refmoe.arithmetic.enclosure.products import Accumulator, product
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, FLOAT32, FORMATS, nearest
from refmoe.checkpoints.weight import Weight
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.verifier.tally import Tally
from tests.arithmetic.enclosure.legal import KINDS, draw


@pytest.mark.parametrize("kind", accumulators.KINDS)
@pytest.mark.parametrize("storage", bench.POLICIES)
@pytest.mark.parametrize("n", [1, 2, 33, 127, 1000])
def test_no_order_of_summation_fails(storage: str, kind: str, n: int) -> None:
    """Structured rows included, whose partial sums are far larger than chance makes them."""
    x, w = accumulators.data(kind, n, storage)
    terms = x[:, None] * w
    plain = bench.enclose(x, w, bench.POLICIES[storage])
    for variant in (*accumulators.LEGAL.values(), accumulators.by_size):
        sums = np.asarray(variant(terms), np.float64)
        assert (np.abs(sums - plain.mid[0]) <= plain.r[0]).all()
        if variant is not accumulators.by_size:
            assert bench.hold(plain, nearest(sums, FORMATS[storage]), storage).excess < bench.LIMIT / 2
            assert np.abs((sums - plain.mid[0]) / np.sqrt(plain.v[0])).max() < bench.LIMIT / 2
    wide = bench.enclose(x, w, bench.TRUNCATING[storage])
    exact = nearest(terms, FLOAT32) if storage == "float32" else terms
    for variant in accumulators.TRUNCATED.values():
        sums = variant(exact)
        assert (np.abs(sums - wide.mid[0]) <= wide.r[0]).all()
        beyond = np.abs(sums - wide.mid[0]) - wide.bias[0]
        assert (beyond / np.sqrt(wide.v[0])).max() < bench.LIMIT


@pytest.mark.parametrize("storage", bench.POLICIES)
def test_the_excess_sees_one_dropped_term_of_14336_and_a_float16_accumulator(storage: str) -> None:
    """The excess sees faults that the radius does not: it is a thousand times the error of legal sums."""
    for fault in ("one term dropped", "float16 accumulator, per 32", "float16 accumulator, per term"):
        found = bench.fault_row(fault, storage, 14336)
        assert found is not None
        assert found["excess"] > 10 * bench.LIMIT, (fault, found)


@pytest.mark.slow
@pytest.mark.parametrize("storage", bench.POLICIES)
def test_long_legal_sums_stay_far_below_the_limit(storage: str) -> None:
    for n in bench.SIZES:
        row = bench.tightness(storage, n)
        assert row["outside"] == row["truncating"]["outside"] == 0
        assert max(row["excess"], row["truncating"]["excess"]) < bench.LIMIT / 1.5


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["float32", "bfloat16", "float64"]))
def test_a_product_contains_the_exact_sum_and_the_worst_corner(seed: int, name: str) -> None:
    """Each input at the end of its interval that moves the sum most."""
    rng, p = np.random.default_rng(seed), policy(name)
    n = int(rng.integers(1, 20))
    x, w = (nearest(np.abs(rng.standard_normal(n)) * 2.0 ** rng.integers(-9, 9, n), p.storage) for _ in "xw")
    x *= (sign := rng.choice([-1, 1]))
    rx, rw = (np.abs(part) * rng.choice([0, 2.0**-9, 0.5], n) for part in (x, w))
    ops = EnclosureOps(p)
    found = ops.matmul(
        Enclosure(x[None], rx[None], rx[None] ** 2, accumulation=p.accumulation),
        Enclosure(w[:, None], rw[:, None], rw[:, None] ** 2, accumulation=p.accumulation),
    )
    corner = sum(
        (Fraction(a) + int(sign) * Fraction(ra)) * (Fraction(b) + Fraction(rb))
        for a, ra, b, rb in zip(x.tolist(), rx.tolist(), w.tolist(), rw.tolist(), strict=True)
    )  # fmt: skip
    assert abs(corner - Fraction(float(found.mid[0, 0]))) <= Fraction(float(found.r[0, 0]))


def test_a_subnormal_factor_may_be_flushed_where_the_policy_says_so() -> None:
    x, w = np.full((1, 64), 2.0**-130), np.ones((64, 3))
    for name, legal in (("hf-bfloat16", True), ("float32", False)):
        product = EnclosureOps(policy(name)).matmul(Enclosure(x), Enclosure(w))
        tally = Tally()
        tally.add(product[0], np.zeros(3), BFLOAT16, BFLOAT16, lambda at: (at,), False)
        assert (tally.outside == 0) == legal
        assert (tally.excess < bench.LIMIT) == legal


def test_a_bias_counts_as_spread_once_the_value_is_used() -> None:
    """A sum of one sign, truncated: what comes after sees it lean by a hundred standard deviations."""
    x, w = accumulators.data("one-signed", 4096, "bfloat16")
    product = bench.enclose(x, w, "bfloat16")
    lean = np.abs(accumulators.aligned(x[:, None] * w, 4, 24) - product.mid[0])
    assert (lean / np.sqrt(product.v[0])).max() > bench.LIMIT
    for used in (product.settle(), product.cut(BFLOAT16), product * 1.0, product + 0.0):
        assert (lean / np.sqrt(used.settle().v[0])).max() < 5


@given(
    seed=st.integers(0, 2**32),
    name=st.sampled_from(["float32", "bfloat16", "float16", "float32+flushes=true", "float64"]),
    n=st.integers(1, 700),
    kind=st.sampled_from(KINDS),
    exponent=st.sampled_from([-250, -100, 0, 0, 0, 100, 150]),
)
def test_the_variance_that_is_known_is_part_of_the_whole(
    seed: int, name: str, n: int, kind: str, exponent: int
) -> None:
    rng, used = np.random.default_rng(seed), policy(name)
    rows = draw(rng, kind, (4, n), used.storage).astype(used.storage.dtype)
    x = Enclosure(draw(rng, kind, (3, n), used.storage) * 2.0**exponent, accumulation=used.accumulation)
    how = Accumulator(used.accumulation, used.storage, flushes=used.flushes)
    for matrix in (matrix_of(rows, used.storage, 0), Matrix(Enclosure(rows.astype(np.float64).T))):
        found = product(x, matrix, how)
        assert found.defers
        least = found.least_variance
        assert (least <= found.variance).all()

        if kind == "gaussian" and exponent == 0 and n > 20:
            assert (least > found.variance / 20).all()


@pytest.mark.parametrize("name", ["float32", "float16+truncates=true"])
def test_a_streamed_product_defers_what_a_whole_one_does(name: str) -> None:
    used, rng = policy(name), np.random.default_rng(1)
    x, rows = rng.standard_normal((3, 512)), rng.standard_normal((5000, 512)).astype(np.float16)
    weight = Weight("layers.0.attention.wq", rows.shape, rows.dtype, source=lambda: rows, origin="w")
    whole, streamed = (EnclosureOps(used, matrix_bytes=size).linear(Enclosure(x), weight) for size in (1 << 30, 1000))
    assert whole.defers
    assert streamed.defers
    for part in ("mid", "radius", "least_variance", "variance", *(["bias"] if whole.biased else [])):
        np.testing.assert_array_equal(getattr(whole, part), getattr(streamed, part), err_msg=part)
    assert whole.biased == streamed.biased


def test_one_exact_product_needs_no_rounding() -> None:
    """A context of one key is its value; two bfloat16 have a product of 16 bits."""
    x, w = np.array([[1.0078125]]), np.array([[1.015625, -3.0]])
    found = EnclosureOps(policy("hf-bfloat16")).matmul(Enclosure(x), Enclosure(w))
    assert (found.r <= 2.0**-48).all()
    longer = np.array([[1 + 2.0**-20]])  # kept more precisely than the policy's dtype: its products round
    assert (EnclosureOps(policy("hf-bfloat16")).matmul(Enclosure(longer), Enclosure(w)).r > 2.0**-25).all()


def test_a_product_of_a_factor_that_was_never_stored_rounds() -> None:
    """The end of an interval, with more bits than the storage dtype, times a weight."""
    rng = np.random.default_rng(1)
    x, w = nearest(1 + rng.random(500), BFLOAT16), nearest(1 + rng.random(500), BFLOAT16)
    end = nearest(x + 2.0**-9 * rng.random(500), FLOAT32)
    ops = EnclosureOps(policy("hf-bfloat16"))
    found = ops.matmul(Enclosure(x[:, None, None], (end - x)[:, None, None]), Enclosure(w[:, None, None]))
    assert (np.abs(nearest(end * w, FLOAT32) - found.mid[:, 0, 0]) <= found.r[:, 0, 0]).all()


def test_unknown_values_meet_masked_probabilities_without_harm() -> None:
    probs, values = np.array([[1.0, 0.0]]), np.array([[2.0], [3.0]])
    unknown = Enclosure(values, np.array([[0.0], [np.inf]]), np.array([[0.0], [np.inf]]))
    ops = EnclosureOps(policy("float32"))
    stored = ops.cut("attention.probs", Enclosure(probs, np.array([[0.1, 0.0]])))
    assert stored.r[0, 1] == stored.v[0, 1] == 0
    assert stored.r[0, 0] > 0.1
    assert np.isfinite(ops.matmul(stored, unknown).r).all()
    assert np.isfinite(ops.matmul(Enclosure(probs), unknown).r).all()
    assert np.isinf(ops.matmul(Enclosure(np.array([[1.0, 0.1]])), unknown).r).all()
    assert np.isinf(ops.matmul(unknown.transpose(1, 0), Enclosure(np.ones((2, 1)))).r).all()


def flash(q: Any, k: Any, v: Any, storage: Any, rng: np.random.Generator) -> Any:
    """Online softmax over blocks of keys, exponentials rounded before they meet values. q: [T, d]   k, v: [S, d]"""
    block = int(rng.choice([16, 32, 64]))
    scores = (q @ k.T * np.float32(1 / np.sqrt(q.shape[-1]))).astype(np.float32)
    top = np.full((len(q), 1), -np.inf, np.float32)
    total, context = np.zeros((len(q), 1), np.float32), np.zeros((len(q), v.shape[1]), np.float32)
    for start in range(0, len(k), block):
        part = scores[:, start : start + block]
        new = np.maximum(top, part.max(1, keepdims=True))
        rescale, e = np.exp(top - new), np.exp(part - new)
        total = total * rescale + e.sum(1, keepdims=True)
        context = context * rescale + nearest(e, storage).astype(np.float32) @ v[start : start + block]
        top = new
    return (context / total).astype(np.float64)


@pytest.mark.parametrize("storage", [BFLOAT16, FLOAT16, FLOAT32])
def test_flash_attention_is_legal(storage: Any) -> None:
    """Scores and probabilities of long rows never exist as a whole; small probabilities are subnormal float16."""
    rng = np.random.default_rng(5)
    name = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}[storage.name]
    ops = EnclosureOps(policy(name))
    for keys, sharp in ((1, 1), (40, 1), (500, 3), (3000, 0.3)):
        q, k, v = (nearest(rng.standard_normal((n, 16)) * s, storage) for n, s in ((3, sharp), (keys, 1), (keys, 1)))
        scores = ops.matmul(Enclosure(q), Enclosure(k.T)) / np.sqrt(16)
        probs = ops.tap("attention.probs", ops.softmax(ops.tap("attention.scores", scores), None))
        context = ops.matmul(probs, Enclosure(v))
        for _ in range(3):
            found = nearest(flash(*(part.astype(np.float32) for part in (q, k, v)), storage, rng), storage)
            tally = Tally()
            tally.add(context.map(np.ravel), found.ravel(), storage, storage, lambda at: (at,), False)
            assert tally.outside == 0
            assert tally.excess < 5
