# SPDX-License-Identifier: Apache-2.0
"""The queries and keys that scores are computed from, where the trace has no scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.verifier.diagnosis.grammar.fault import Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory, only_where, spread
from refmoe.verifier.diagnosis.grammar.orders import orders
from refmoe.verifier.diagnosis.grammar.settings import At, setting
from refmoe.verifier.diagnosis.grammar.views import View, layer
from refmoe.verifier.passes import Key


def operands(search: Search) -> Iterator[Fault]:
    """Other queries and keys than rotated ones, other heads, and either of them moved by a law."""
    if search.step != "attention.probs":
        return
    for words, change in CHOICES:
        yield setting(words, f"the scores are computed with {words}", FIX, 4.0, scores=change)
    for name, dims, words in (("q", "T H d", "the rotated queries"), ("k", "S K d", "the cached keys")):
        yield from orders(search, View(words, tuple(dims.split()), {}, *_through(name)))


def scores_with(lab: Laboratory, key: Key, **operands: Any) -> Any:
    """The scores from other queries q or keys k."""
    scores = key[0], key[1].replace("probs", "scores")
    return lab.ops.cut("attention.scores", lab.compute(scores, {**lab.inputs(scores), **operands}))


def _through(name: str) -> tuple[Any, Any]:
    def base(lab: Laboratory, key: Key) -> Any:
        return lab.inputs((key[0], key[1].replace("probs", "scores")))[name]

    def lift(lab: Laboratory, key: Key, x: Enclosure) -> Any:
        return lab.compute(key, {**lab.inputs(key), "scores": scores_with(lab, key, **{name: x})})

    return base, lift


def _read(lab: Laboratory, key: Key, tap: str) -> Any:
    return lab.read((key[0], f"layers.{layer(key)}.{tap}"))


def _past(lab: Laboratory, key: Key, tap: str, by: int = 0) -> Any:
    """The cached values of a tap, in this layer or one further on. None where there is no such layer."""
    at = (layer(key) or 0) + by
    return lab.cached(key[0], tap, at) if 0 <= at < lab.config.layers else None


def _keys_of(tap: str, by: int = 0) -> At:
    def change(lab: Laboratory, key: Key) -> Any:
        keys = _past(lab, key, tap, by)
        return None if keys is None else scores_with(lab, key, k=keys)

    return change


def _by_remainder(lab: Laboratory, key: Key) -> Any:
    """Query head h with key/value head h % K."""
    heads, groups = lab.config.heads, lab.config.kv_heads
    if groups == 1:
        return None
    keys = lab.inputs((key[0], key[1].replace("probs", "scores")))["k"]
    own, wanted = np.arange(heads) // (heads // groups), np.arange(heads) % groups
    mixed = None
    for g in range(groups):
        part = scores_with(lab, key, k=keys[:, (np.arange(groups) + g) % groups])
        here = ((own + g) % groups == wanted)[:, None, None]
        mixed = part if mixed is None else only_where(here, spread(part, part.mid.shape), mixed)
    return mixed


CHOICES: tuple[tuple[str, At], ...] = (
    ("keys not rotated", _keys_of("attention.k")),
    ("queries not rotated", lambda lab, key: scores_with(lab, key, q=_read(lab, key, "attention.q"))),
    (
        "queries and keys not rotated",
        lambda lab, key: scores_with(lab, key, q=_read(lab, key, "attention.q"), k=_past(lab, key, "attention.k")),
    ),
    ("values in the place of keys", _keys_of("attention.v")),
    ("the keys of the layer before", _keys_of("attention.k_rope", -1)),
    ("the keys of the next layer", _keys_of("attention.k_rope", 1)),
    ("query heads paired with key/value head h % K", _by_remainder),
)
"""Other queries and keys, in words."""
FIX = "look at what attention is called with"
