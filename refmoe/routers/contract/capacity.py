# SPDX-License-Identifier: Apache-2.0
"""Laws of capacity: how many tokens an expert keeps, and which."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.drawing import BLOCK_COUNTS
from refmoe.contracts.formats import Floats
from refmoe.contracts.law import Strategy
from refmoe.routers.contract.bounds import weight_enclosure
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import batches_of, ranks
from refmoe.routers.contract.law import CAPACITY, KNOWN_SCORING, NO_BIAS, law
from refmoe.routers.contract.subject import Routing, Subject


def crowds(d: Declaration) -> Strategy:
    """Enough tokens that one expert overflows, and no ties, so that each token's choices are known."""
    small = st.integers(1, 12)
    counts = st.one_of(small, small, small, st.sampled_from([n for n in BLOCK_COUNTS if n < 300]))
    return st.fixed_dictionaries({"logits": batches_of(d, (ranks,), counts, 12)})


def kept_pairs(subject: Subject, logits: Floats) -> tuple[Routing, set[tuple[int, int]]]:
    """One call with all tokens, and the (token, expert) pairs that it keeps."""
    routing = subject.route(logits, together=True)
    inside = (routing.ids >= 0) & (routing.ids < subject.declaration.experts) & (routing.weights > 0)
    pairs = [(int(token), int(routing.ids[token, slot])) for token, slot in np.argwhere(inside)]
    if len(set(pairs)) != len(pairs):
        raise LawBroken("a token keeps the same expert twice")
    return routing, set(pairs)


@law(
    "capacity-limit",
    "No expert keeps more tokens than its capacity.",
    "Lepikhin et al. 2020, algorithm 1; Fedus et al. 2021, eq. 3",
    crowds,
    CAPACITY,
)
def capacity_limit(subject: Subject, logits: Floats) -> None:
    capacity = subject.declaration.capacity_of(len(logits))
    counts: dict[int, int] = defaultdict(int)
    for _, expert in kept_pairs(subject, logits)[1]:
        counts[expert] += 1
    for expert, count in counts.items():
        if count > capacity:
            raise LawBroken(f"expert {expert} keeps {count} of {len(logits)} tokens, its capacity is {capacity}")


@law(
    "capacity-prefix",
    "The tokens that an expert keeps are the first in priority order that want it, and none is dropped while there is "
    "room.",
    "Lepikhin et al. 2020, algorithm 1; Riquelme et al. 2021 (batch prioritized routing)",
    crowds,
    CAPACITY,
    KNOWN_SCORING,
    NO_BIAS,
)
def capacity_prefix(subject: Subject, logits: Floats) -> None:
    d = subject.declaration
    routing, kept = kept_pairs(subject, logits)
    wanted = np.argsort(-logits, axis=1, kind="stable")[:, : d.top_k]
    extra = kept - {(token, int(expert)) for token, row in enumerate(wanted) for expert in row}
    if extra:
        token, expert = min(extra)
        raise LawBroken(f"token {token} keeps expert {expert}, but wants {wanted[token].tolist()}", token)
    known = weight_enclosure(d, Routing(logits, routing.radius, wanted, np.zeros(wanted.shape)))
    assert known is not None
    for expert in range(d.experts):
        line = [(int(token), int(slot)) for token, slot in np.argwhere(wanted == expert)]
        inside = [place for place in line if (place[0], expert) in kept]
        outside = [place for place in line if (place[0], expert) not in kept]
        capacity = d.capacity_of(len(logits))
        if outside and len(inside) < capacity:
            token = outside[0][0]
            raise LawBroken(
                f"expert {expert} keeps {len(inside)}, has room for {capacity} and drops token {token}", token
            )
        for late in inside:
            for early in outside:
                if comes_first(d, early, late, known.low, known.high):
                    words = f"expert {expert} keeps token {late[0]} and drops token {early[0]}, which comes first"
                    raise LawBroken(f"{words} by {d.priority}", early[0])


def comes_first(d: Declaration, a: tuple[int, int], b: tuple[int, int], low: Floats, high: Floats) -> bool:
    """Whether the choice a = (token, slot) certainly has priority over b."""
    if d.priority == "weight":
        return bool(low[a] > high[b])
    return a < b if d.priority == "token" else (a[1], a[0]) < (b[1], b[0])
