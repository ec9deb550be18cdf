# SPDX-License-Identifier: Apache-2.0
"""Laws of values: exact where no operation rounds, and legal where operations do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.law import Need, Strategy
from refmoe.kernels.arrays import check_exact
from refmoe.kernels.moe.call import Call, exact_result
from refmoe.kernels.moe.data import Sizes, cancelling, dense_call, exact_call, single_terms
from refmoe.kernels.moe.declaration import Declaration
from refmoe.kernels.moe.examples import around_blocks, loads, only, small, widths
from refmoe.kernels.moe.law import law
from refmoe.kernels.moe.subject import Subject

JUDGE = Need("a judge of values, as refmoe.testing has", lambda s: s.legal is not None)
NO_ROUNDING = ", as no operation rounds"
SCALES = (0, 0, 0, 2, -4, 8, -12)
"""Powers of two by which x is multiplied in narrow formats."""
WIDE_SCALES = (0, 0, 0, 8, -20, 30, -40)
PLACES = ("w_up", "w_down")


def exactly(subject: Subject, call: Call, words: str = NO_ROUNDING) -> None:
    """The result of an exact call is its mathematical one. It is computed after the kernel has returned."""
    found = subject.run(call)
    check_exact(found, exact_result(call), words)


@law(
    "form",
    "The result is one array [T, D] of floating-point numbers, for no token as well.",
    "MOE-1; a rank of several may get no token",
    lambda d: only(small(d, least=0)),
)
def form(subject: Subject, sizes: Sizes) -> None:
    subject.run(exact_call(sizes))


@law(
    "exact-sums",
    "Where no operation rounds, every value is exact.",
    "EXPERT-1, COMBINE-1; silu(1024 n) is 1024 n or 0 in every format",
    lambda d: only(small(d, repeated=True)),
)
def exact_sums(subject: Subject, sizes: Sizes) -> None:
    exactly(subject, exact_call(sizes))


def with_scale(d: Declaration) -> Strategy:
    scales = SCALES if d.dtype == "float16" else WIDE_SCALES
    return only(small(d, most=6, repeated=True), scale=st.sampled_from(scales))


@law(
    "legal-values",
    "Every value lies within the enclosure of its formula in the declared dtypes.",
    "EXPERT-1, COMBINE-1 within the policy; docs/verification.md",
    with_scale,
    JUDGE,
)
def legal_values(subject: Subject, sizes: Sizes, scale: int) -> None:
    assert subject.legal is not None
    call = dense_call(sizes, subject.declaration, scale)
    arguments = subject.arguments(call)
    judged = subject.legal(subject.own(arguments, subject.start(arguments)), call, subject.declaration)
    if judged is not None:
        raise LawBroken(judged.words, judged.token)


@law(
    "wide-sums",
    "Sums are kept in the declared format: large terms that cancel leave the small ones.",
    "EXPERT-1; sums in float16 where float32 is meant (microsoft/onnxruntime#29166)",
    lambda d: only(small(d, most=3, width=3)),
)
def wide_sums(subject: Subject, sizes: Sizes) -> None:
    exactly(subject, cancelling(sizes, subject.declaration), ": the declared sums hold every partial sum")


@law(
    "rounds-to-nearest",
    "A sum of one product is that product, rounded to nearest.",
    "IEEE 754-2019, 4.3.1; truncation to bfloat16 (ROCm/aiter#5151)",
    lambda d: only(small(d, most=3)),
    Need("a dtype narrower than float64", lambda s: s.declaration.dtype != "float64"),
    Need("no policy of its own, which may round twice", lambda s: s.declaration.policy is None),
)
def rounds_to_nearest(subject: Subject, sizes: Sizes) -> None:
    call = single_terms(sizes, subject.declaration)
    found, exact = subject.run(call), exact_result(call)
    _, exponent = np.frexp(exact)
    half = np.ldexp(0.5, exponent - subject.declaration.given.precision)
    wrong = ~(np.abs(found - exact) <= half)
    for token, column in np.argwhere(wrong)[:1]:
        value, right = float(found[token, column]), float(exact[token, column])
        off = abs(value - right) / (2 * half[token, column])
        words = f"found {value!r} for {right!r}, {off:.3g} units in the last place away; at most 0.5 was expected"
        raise LawBroken(words, int(token))


@law(
    "block-sizes",
    "The number of tokens does not matter: 0, 1, and those around blocks of 32, 128, 256 and 1024 least of all.",
    "DISPATCH-1; last blocks that are dropped or read too far (ggml-org/llama.cpp#17032 reduces one token only)",
    lambda d: only(around_blocks(d)),
)
def block_sizes(subject: Subject, sizes: Sizes) -> None:
    exactly(subject, exact_call(sizes))


@law(
    "loads",
    "Any number of experts up to 256 and any load is right: all tokens on one, most without any, k = 1, k = E.",
    "DISPATCH-1, ROUTE-2; experts beyond the 256th (kekzl/imp#2056)",
    lambda d: only(loads(d)),
)
def any_load(subject: Subject, sizes: Sizes) -> None:
    exactly(subject, exact_call(sizes))


@law(
    "widths",
    "Hidden sizes are right that are multiples of nothing, and those around tiles.",
    "EXPERT-1; tails of sums and padding that is not zero (ROCm/aiter#5413, AI-Hypercomputer/maxtext#1183)",
    lambda d: only(widths(d)),
)
def any_width(subject: Subject, sizes: Sizes) -> None:
    exactly(subject, exact_call(sizes))


def with_power(d: Declaration) -> Strategy:
    powers = (-8, -4, 2, 3) if d.dtype == "float16" else (-60, -30, -9, 6, 30, 60)
    return only(small(d, most=3), power=st.sampled_from(powers), place=st.sampled_from(PLACES))


@law(
    "powers-of-two",
    "A power of two in the matrix of up or down is a power of two in the result.",
    "EXPERT-1 is linear in both; small scales lost (flashinfer-ai/flashinfer#2356), intermediates in float16",
    with_power,
)
def powers_of_two(subject: Subject, sizes: Sizes, power: int, place: str) -> None:
    call = exact_call(sizes)
    scaled = replace(call, **{place: getattr(call, place) * 2.0**power})
    found = subject.run(scaled)
    check_exact(found, exact_result(call) * 2.0**power, f": {place} is multiplied by 2^{power}")
