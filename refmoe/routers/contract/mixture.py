# SPDX-License-Identifier: Apache-2.0
"""The law of dispatch and combine: a row sent to the experts comes back to its token."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken, foreign
from refmoe.contracts.drawing import BLOCK_COUNTS
from refmoe.contracts.formats import Floats, Ints
from refmoe.contracts.frameworks import to_numpy
from refmoe.contracts.law import Example, Need, Strategy
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import zigzag
from refmoe.routers.contract.law import law
from refmoe.routers.contract.subject import Subject

WIDTH = 5
ONE_SET, ONE_EXPERT = "one set of experts for all", "one expert for all, among others"
LOADS = ("spread", ONE_SET, ONE_EXPERT)


def loads(d: Declaration) -> Strategy:
    """Rows of small integers, and for each token an order of the experts, with even and uneven loads."""

    def build(drawn: tuple[int, bytes, str]) -> Example:
        tokens, block, load = drawn
        numbers = np.resize(np.frombuffer(block, np.uint8).astype(np.int64), (tokens, WIDTH + d.experts))
        numbers = (numbers + 7 * np.arange(tokens)[:, None] * (block[0] % 2)) % 256
        order = numbers[:, WIDTH:].copy()
        if load == ONE_SET:
            order[:] = order[0]
        if load == ONE_EXPERT:
            order[:, 0] = -1
        return {"x": zigzag(numbers[:, :WIDTH] % 16), "order": np.argsort(order, axis=1, kind="stable")}

    size = 4 * (WIDTH + d.experts)
    tokens = st.one_of(st.integers(1, 9), st.sampled_from([n for n in BLOCK_COUNTS if n < 300]))
    return st.tuples(tokens, st.binary(min_size=size, max_size=size), st.sampled_from(LOADS)).map(build)


def dyadic(k: int) -> list[float]:
    """k weights that sum to 1. Their products with small integers, and sums of these, are exact in every format."""
    return {1: [1.0], 2: [0.75, 0.25]}.get(k, [0.5, 0.25, 0.25] + [0.0] * (k - 3))


@law(
    "dispatch-combine",
    "With experts that return what they are given and weights that sum to 1, dispatch then combine is the identity.",
    "COMBINE-1, DISPATCH-1 to DISPATCH-4; Lepikhin et al. 2020, algorithm 2",
    loads,
    Need("dispatch and combine", lambda s: s.dispatch is not None and s.combine is not None),
)
def dispatch_combine(subject: Subject, x: Floats, order: Ints) -> None:
    k = subject.declaration.top_k
    ids, weights = np.ascontiguousarray(order[:, :k]), np.tile(dyadic(k), (len(x), 1))
    assert subject.dispatch is not None
    assert subject.combine is not None
    arrays = [subject.array(each) for each in (x, ids, weights)]
    with foreign("dispatch or combine", f" on {len(x)} tokens"):
        rows, plan = subject.dispatch(*arrays[:2])
        found = to_numpy(subject.combine(rows, plan, arrays[2]))
    if found.shape != x.shape:
        raise LawBroken(f"found shape {list(found.shape)}, {list(x.shape)} was expected")
    for token in np.flatnonzero((found != x).any(axis=1))[:1]:
        raise LawBroken(
            f"token {token} of {len(x)}: found {found[token].tolist()}, expected {x[token].tolist()} exactly, as no "
            f"operation rounds",
            int(token),
        )
