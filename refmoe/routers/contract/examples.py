# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: batches of logits that are numbers of the declared format, in kinds for different mistakes.

A batch is drawn as a block of bytes, because that is fast and shrinks to zeros. Each kind maps bytes to logits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.formats import Floats, Format, Ints, neighbour, rounded
from refmoe.contracts.law import Strategy
from refmoe.routers.contract.declaration import Declaration


def zigzag(drawn: Ints) -> Floats:
    """0, 1, 2, 3, 4 ... to 0, 1, -1, 2, -2 ...: bytes shrink to small numbers of either sign."""
    return np.where(drawn % 2 == 1, drawn // 2 + 1, -(drawn // 2)).astype(np.float64)


def plain(drawn: Ints, form: Format) -> Floats:
    """Multiples of 1/16 within +-8."""
    return zigzag(drawn) / 16


def coarse(drawn: Ints, form: Format) -> Floats:
    """Integers within +-8, whose differences are clear in every format."""
    return zigzag(drawn % 17)


def ties(drawn: Ints, form: Format) -> Floats:
    """Only three values, so logits tie at every rank. They are 2 apart, which is clear in every format."""
    return 2 * zigzag(drawn % 3)


def near_ties(drawn: Ints, form: Format) -> Floats:
    """A common value and a few places above it."""
    return neighbour(1.0 + zigzag(drawn[:, :1] % 7) / 4, drawn % 5, form)


def one_ulp(drawn: Ints, form: Format) -> Floats:
    """Neighbours in the format, at magnitudes between 2^-8 and 2^8."""
    return neighbour(np.exp2(zigzag(drawn[:, :1] % 17)), drawn % 2, form)


def half_precision_neighbours(drawn: Ints, form: Format) -> Floats:
    """1 and a little more: apart in float32, equal in bfloat16 and for the smallest steps in float16."""
    steps = np.array([0, 2.0**-4, 2.0**-9, 2.0**-12, 2.0**-16, 2.0**-20])
    return rounded(1.0 + steps[drawn % len(steps)], form)


def extreme(drawn: Ints, form: Format) -> Floats:
    """The largest numbers of the format, and numbers at which exp overflows or underflows."""
    top, sizes = form.largest, (1.0, 11.5, 89.0, 104.0, 710.0, 746.0, 1e4)
    table = [0.0, 1.0, -1.0, *sizes, *(-size for size in sizes), top, -top, top / 2, -top / 2]
    return rounded(np.array(table)[drawn % len(table)], form)


def subnormal(drawn: Ints, form: Format) -> Floats:
    """Zero, the smallest normal number and subnormal numbers: nearly equal, but different."""
    return np.where(drawn % 16 == 15, form.smallest_normal, zigzag(drawn % 9) * form.smallest_subnormal)


def skewed(drawn: Ints, form: Format) -> Floats:
    """Most tokens want the experts that the first byte names; the last ones stay empty."""
    values, hot = zigzag(drawn % 17), int(drawn.flat[0]) % drawn.shape[1]
    values[:, hot] += 24.0
    values[:, (hot + 1) % drawn.shape[1]] += 24.0
    return values


def ranks(drawn: Ints, form: Format) -> Floats:
    """Distinct integers, so that every decision is forced, with one expert that most tokens want."""
    order = np.argsort(np.argsort(drawn, axis=1, kind="stable"), axis=1, kind="stable").astype(np.float64)
    order -= drawn.shape[1] // 2
    hot = int(drawn.flat[0]) % drawn.shape[1]
    order[:, hot] += np.where(drawn[:, hot] % 4 != 3, drawn.shape[1], 0)
    return np.clip(order, -240.0, 240.0)


Kind = Callable[[Ints, Format], Floats]
MODERATE: tuple[Kind, ...] = (plain, coarse, ties, skewed)
CLOSE: tuple[Kind, ...] = (near_ties, one_ulp, half_precision_neighbours, subnormal)
EVERYTHING: tuple[Kind, ...] = (*MODERATE, *CLOSE, extreme)


def inputs(d: Declaration, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The kinds that suit a declaration. A scoring of "other" may saturate, so it gets no extreme logits."""
    usable = tuple(kind for kind in kinds if kind is not extreme) if d.scoring == "other" else kinds
    return usable if d.gate is None else tuple(kind for kind in usable if kind in MODERATE) or (plain,)


def batches(d: Declaration, kinds: tuple[Kind, ...], most: int = 4, least: int = 1) -> Strategy:
    """Logits [T, E], `least` to `most` tokens. The kind is drawn last, so that shrinking changes it last."""
    return batches_of(d, kinds, st.integers(least, most), most)


def batches_of(d: Declaration, kinds: tuple[Kind, ...], counts: Strategy, most: int) -> Strategy:
    """Logits [T, E] for T drawn from `counts`. Beyond `most` tokens the bytes repeat, mixed with the token's number."""

    def build(drawn: tuple[int, bytes, Kind]) -> Floats:
        tokens, block, kind = drawn
        numbers = np.frombuffer(block, np.uint8).astype(np.int64).reshape(most, d.experts)
        if tokens > most:
            turn = np.arange(tokens)[:, None] // most
            numbers = (np.resize(numbers, (tokens, d.experts)) + 37 * turn) % 256
        return frozen(np.clip(kind(numbers[:tokens], d.given), -most_size, most_size))

    most_size = min(d.given.largest, d.working.largest)
    size = most * d.experts
    return st.tuples(counts, st.binary(min_size=size, max_size=size), st.sampled_from(inputs(d, kinds))).map(build)


def frozen(values: Floats) -> Floats:
    """A read-only array, as routers share examples. It has no -0, because a sum of products cannot give -0."""
    values = values + 0.0
    values.flags.writeable = False
    return values


def any_batch(d: Declaration) -> Strategy:
    """Logits of every kind."""
    return st.fixed_dictionaries({"logits": batches(d, EVERYTHING)})


def wide_batch(d: Declaration) -> Strategy:
    """Logits of every kind except those a few places apart."""
    return st.fixed_dictionaries({"logits": batches(d, (*MODERATE, extreme))})


def moderate_batch(d: Declaration) -> Strategy:
    """Logits as a model may have them."""
    return st.fixed_dictionaries({"logits": batches(d, MODERATE)})


def close_batch(d: Declaration) -> Strategy:
    """Logits a few places apart."""
    return st.fixed_dictionaries({"logits": batches(d, CLOSE)})


def tied_batch(d: Declaration) -> Strategy:
    """Logits of three values."""
    return st.fixed_dictionaries({"logits": batches(d, (ties,))})
