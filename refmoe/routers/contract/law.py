# SPDX-License-Identifier: Apache-2.0
"""The contract of routers, in which each module of laws registers its own, and the needs that laws share."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from refmoe.contracts.law import Contract, Example, Need
from refmoe.routers.contract.declaration import Declaration


@lru_cache(maxsize=4096)
def sketch(d: Declaration) -> Declaration:
    """The part of a declaration that its examples depend on. Routers with equal sketches get equal examples."""
    return Declaration(
        experts=d.experts,
        top_k=1,
        dtype=d.dtype,
        arithmetic=d.arithmetic or d.dtype,
        scoring="other" if d.scoring == "other" else "softmax",
        nan="raise" if d.nan == "raise" else "unspecified",
        gate=None if d.gate is None else np.eye(d.experts),
    )


def tokens(example: Example) -> int:
    """The number of tokens: the rows of the logits, or of what dispatch is given."""
    batch = example.get("logits", example.get("x"))
    return 0 if batch is None else len(batch)


CONTRACT = Contract(subject="router", shape_law="distinct-ids", sketch=sketch, tokens=tokens)
LAWS = CONTRACT.laws
"""All laws by name, in the order of `laws.py`."""
law = CONTRACT.law

NORMALISED = Need("weights declared normalised", lambda s: s.declaration.normalised)
KNOWN_SCORING = Need("a known scoring: softmax or sigmoid", lambda s: s.declaration.scoring != "other")
LOGITS = Need("a router that is given logits, not hidden states", lambda s: s.declaration.gate is None)
NO_BIAS = Need("a selection without bias", lambda s: s.declaration.bias is None)
NO_CAPACITY = Need("no capacity: with one, tokens compete", lambda s: s.declaration.capacity is None)
CAPACITY = Need("a declared capacity", lambda s: s.declaration.capacity is not None)
ANY_K = Need("the same router for k = E (with_top_k; --factory)", lambda s: s.with_top_k is not None)
SEVERAL = Need("k < E: else there is nothing to choose", lambda s: s.declaration.top_k < s.declaration.experts)
