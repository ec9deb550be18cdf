# SPDX-License-Identifier: Apache-2.0
"""The rows in which a fault acts, in words: calls, layers, tokens, experts, slots.

A row is one token of one call, or one slot of one token. A fault must act in every row that is wrong. It must not act
in a row that is right and would be wrong under the fault. Of all descriptions that keep to this, the shortest holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

OPS = ("prefill", "chunk", "decode")
LISTED = 6
"""The most members of a list in words."""


@dataclass(frozen=True)
class Rows:
    """The attributes of all rows of a step, an array [n] each."""

    run: Any
    """The number of the call, in order."""
    op: Any
    sequence: Any
    length: Any
    """The number of tokens of the call."""
    past: Any
    layer: Any
    token: Any
    expert: Any
    """The expert of the slot; -1 in steps without slots."""
    slot: Any
    names: Sequence[str]
    """The names of the calls."""


@dataclass(frozen=True)
class Where:
    """A description.   words: empty if it is everywhere   bits: its length   inside: booleans [n]"""

    words: str
    bits: float
    inside: Any


def describe(rows: Rows, acting: Any, resting: Any) -> Where | None:
    """The shortest description that holds every acting row and no resting one. None if there is none.

    acting, resting: booleans [n]
    """
    everywhere = np.ones(len(acting), bool)
    if not resting.any():
        return Where("", 0.0, everywhere)
    parts = [
        _viable(list(each(rows, acting)), acting, resting) for each in (_calls, _layers, _tokens, _experts, _slots)
    ]
    best: Where | None = None
    for chosen in product(*parts):
        bits = sum(each.bits for each in chosen)
        if best is not None and bits >= best.bits:
            continue
        inside = everywhere
        for each in chosen:
            inside = inside & each.inside
        if not (inside & resting).any():
            best = Where(", ".join(each.words for each in chosen if each.words), bits, inside)
    return best


def _viable(found: list[Where], acting: Any, resting: Any) -> list[Where]:
    """The descriptions that hold every acting row and exclude some resting row, and the one that says nothing."""
    nothing = Where("", 0.0, np.ones(len(acting), bool))
    able = [each for each in found if each.inside[acting].all() and (resting & ~each.inside).any()]
    return [nothing, *sorted(able, key=lambda each: each.bits)[:6]]


def _calls(rows: Rows, acting: Any) -> Iterator[Where]:
    ops = [op for op in OPS if (rows.op[acting] == op).any()]
    yield Where(f"in {_all_of(ops)} calls", 2.0, np.isin(rows.op, ops))
    yield Where("in calls with one token", 2.5, rows.length == 1)
    yield Where("in calls with several tokens", 2.5, rows.length > 1)
    yield Where("in calls on an empty cache", 3.0, rows.past == 0)
    yield Where("in calls that go on from a cache", 3.0, rows.past > 0)
    sequences = sorted(set(rows.sequence[acting].tolist()))
    yield Where(
        f"in sequence{_s(sequences)} {_all_of(sequences)}", 4.0 + len(sequences), np.isin(rows.sequence, sequences)
    )
    calls = sorted(set(rows.run[acting].tolist()))
    first = calls[0]
    yield Where(f"from {rows.names[first]} on", 5.0, rows.run >= first)
    words = _all_of([rows.names[i] for i in calls])
    yield Where(f"in {words}", 6.0 + 2 * len(calls), np.isin(rows.run, calls))


def _layers(rows: Rows, acting: Any) -> Iterator[Where]:
    layers = sorted(set(rows.layer[acting].tolist()))
    yield Where(f"in layer{_s(layers)} {_all_of(layers)}", 1.8 + 0.6 * len(layers), np.isin(rows.layer, layers))
    if layers[0] > 0:
        yield Where(f"from layer {layers[0]} on", 2.5, rows.layer >= layers[0])


def _tokens(rows: Rows, acting: Any) -> Iterator[Where]:
    last = rows.token == rows.length - 1
    yield Where("in the first token of a call", 3.0, rows.token == 0)
    yield Where("in the last token of a call", 3.0, last)
    yield Where("not in the first token of a call", 3.5, rows.token > 0)
    yield Where("not in the last token of a call", 3.5, ~last)
    tokens = sorted(set(rows.token[acting].tolist()))
    yield Where(f"in token{_s(tokens)} {_all_of(tokens)}", 5.0 + 2 * len(tokens), np.isin(rows.token, tokens))
    yield Where(f"from token {tokens[0]} on", 5.0, rows.token >= tokens[0])


def _experts(rows: Rows, acting: Any) -> Iterator[Where]:
    experts = sorted(set(rows.expert[acting].tolist()))
    if experts[0] >= 0:
        yield Where(f"in expert{_s(experts)} {_all_of(experts)}", 3.0 + len(experts), np.isin(rows.expert, experts))


def _slots(rows: Rows, acting: Any) -> Iterator[Where]:
    slots = sorted(set(rows.slot[acting].tolist()))
    if rows.expert[0] >= 0:
        yield Where(f"in slot{_s(slots)} {_all_of(slots)}", 3.5 + len(slots), np.isin(rows.slot, slots))


def _all_of(items: Sequence[Any]) -> str:
    shown = [str(each) for each in items]
    if len(shown) > LISTED:
        return ", ".join(shown[:LISTED]) + ", ..."
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def _s(items: Sequence[Any]) -> str:
    return "s" if len(items) > 1 else ""


listed: Callable[[Sequence[Any]], str] = _all_of
"""Items in words, with commas and `and`. At most `LISTED` of them."""
