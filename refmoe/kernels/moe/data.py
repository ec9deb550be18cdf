# SPDX-License-Identifier: Apache-2.0
"""The arrays of an example, made from its sizes and a seed: integers whose sums are exact, or numbers as in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from refmoe.contracts.formats import Floats, Ints, rounded
from refmoe.kernels.moe.call import Call
from refmoe.kernels.moe.declaration import Declaration

Load = Literal["spread", "one expert", "last expert", "half", "repeated"]
SATURATED = 1024.0
"""The unit of gates in exact data: silu(1024 n) is 1024 n or 0 in every format."""
MOST_SHARES = 16
"""The most slots of a token with a weight other than 0, so that 8 bits hold every partial sum."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of an example, the seed of its numbers, and how tokens choose experts."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    seed: int = 0
    load: Load = "spread"


def random(sizes: Sizes, *more: int) -> np.random.Generator:
    """The source of all numbers of an example. Arrays of one seed and other sizes differ."""
    numbers = (sizes.seed, sizes.tokens, sizes.experts, sizes.top_k, sizes.hidden, sizes.inner)
    return np.random.default_rng([*numbers, *more])


def choose(sizes: Sizes, rng: np.random.Generator) -> Ints:
    """The experts of each token [T, k], as the load says. They are distinct unless it is "repeated"."""
    tokens, experts, k = sizes.tokens, sizes.experts, sizes.top_k
    if sizes.load == "repeated":
        return np.repeat(rng.integers(0, experts, (tokens, 1)), k, axis=1)
    order = np.argsort(rng.random((tokens, experts)), axis=1)
    if sizes.load == "half":  # experts of even number, as far as they suffice
        order = np.take_along_axis(order, np.argsort(order % 2, axis=1, kind="stable"), 1)
    elif sizes.load in ("one expert", "last expert"):
        hot = experts - 1 if sizes.load == "last expert" else experts // 2
        order = np.take_along_axis(order, np.argsort(order != hot, axis=1, kind="stable"), 1)
    return np.ascontiguousarray(order[:, :k])


def sparse(rng: np.random.Generator, shape: tuple[int, int, int], count: int = 2) -> Floats:
    """Matrices [E, rows, columns] whose rows have at most `count` entries of 1 or -1."""
    found = np.zeros(shape)
    at = rng.integers(0, max(shape[2], 1), (*shape[:2], count))
    np.put_along_axis(found, at, rng.choice([-1.0, 1.0], at.shape), axis=2)
    return found


def exact_call(sizes: Sizes) -> Call:
    """A call in which no operation rounds, in any format and any order of sums.

    Every partial sum has at most 8 bits. Gates are 1024 n with |n| <= 2, |up| <= 2, and an output of an expert is <= 8.
    """
    rng = random(sizes)
    shape = (sizes.experts, sizes.inner, sizes.hidden)
    weights = rng.choice([0.5, 1.0], (sizes.tokens, sizes.top_k))
    weights[:, MOST_SHARES:] = 0.0
    return Call(
        x=rng.choice([-1.0, 1.0, 1.0, 0.0], (sizes.tokens, sizes.hidden)),
        w_gate=sparse(rng, shape) * SATURATED,
        w_up=sparse(rng, shape),
        w_down=sparse(rng, (sizes.experts, sizes.hidden, sizes.inner)) / SATURATED,
        ids=choose(sizes, rng),
        weights=weights,
    )


def dense_call(sizes: Sizes, d: Declaration, scale: int = 0) -> Call:
    """A call with numbers as in a model: normally distributed, x times 2^scale, and weights that sum to about 1."""
    rng = random(sizes, 1)
    shape = (sizes.experts, sizes.inner, sizes.hidden)
    shares = rng.random((sizes.tokens, sizes.top_k)) + 0.1
    return Call(
        x=rounded(rng.standard_normal((sizes.tokens, sizes.hidden)) * 2.0**scale, d.given),
        w_gate=rounded(rng.standard_normal(shape) / np.sqrt(max(sizes.hidden, 1)), d.given),
        w_up=rounded(rng.standard_normal(shape) / np.sqrt(max(sizes.hidden, 1)), d.given),
        w_down=rounded(
            rng.standard_normal((sizes.experts, sizes.hidden, sizes.inner)) / np.sqrt(max(sizes.inner, 1)), d.given
        ),
        ids=choose(sizes, rng),
        weights=rounded(shares / shares.sum(axis=1, keepdims=True), d.shares),
    )


def single_terms(sizes: Sizes, d: Declaration) -> Call:
    """A call whose sums have one term each, so that only the last product rounds, once."""
    rng = random(sizes, 2)
    call = exact_call(sizes)
    mantissas = rounded(1 + rng.random((sizes.experts, sizes.hidden)), d.given)
    w_down = np.zeros_like(call.w_down)
    at = rng.integers(0, sizes.inner, (sizes.experts, sizes.hidden, 1))
    np.put_along_axis(w_down, at, mantissas[:, :, None], axis=2)
    w_up, w_gate = np.zeros_like(call.w_up), np.zeros_like(call.w_gate)
    w_up[:, :, 0] = rounded(1 + rng.random((sizes.experts, sizes.inner)), d.given)
    w_gate[:, :, 0] = SATURATED
    x = call.x.copy()
    x[:, 0] = 1.0
    return Call(
        x=x, w_gate=w_gate, w_up=w_up, w_down=w_down / SATURATED, ids=call.ids[:, :1],
        weights=np.ones((sizes.tokens, 1)),
    )  # fmt: skip


def cancelling(sizes: Sizes, d: Declaration) -> Call:
    """A call with terms of 2^n and of 1 whose large ones cancel: exact in the declared sums, but in no narrower ones.

    Both products have such sums: that of w_up over x, and that of w_down over what is between.
    """
    rng = random(sizes, 3)
    inner, hidden, experts = sizes.inner, sizes.hidden, sizes.experts
    large = 2.0 ** (min(d.sums.precision, 2 * d.given.precision + 4) - 3) if d.sums.precision > 11 else 2.0**6
    large = min(large, 2.0**11) if d.given.name == "float16" else large
    w_up, w_down = (np.zeros((experts, rows, columns)) for rows, columns in ((inner, hidden), (hidden, inner)))
    for matrix in (w_up, w_down):
        order = np.argsort(rng.random(matrix.shape), axis=2)
        np.put_along_axis(matrix, order[:, :, :1], large, axis=2)
        np.put_along_axis(matrix, order[:, :, 1:2], -large, axis=2)
        np.put_along_axis(matrix, order[:, :, 2:3], 1.0, axis=2)
    w_gate = np.zeros_like(w_up)
    w_gate[:, :, 0] = SATURATED
    return Call(
        x=np.ones((sizes.tokens, hidden)), w_gate=w_gate, w_up=w_up, w_down=w_down / SATURATED,
        ids=choose(sizes, rng)[:, :1], weights=np.ones((sizes.tokens, 1)),
    )  # fmt: skip
