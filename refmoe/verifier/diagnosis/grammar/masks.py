# SPDX-License-Identifier: Apache-2.0
"""Attention with another mask: by a law, with another window, or with some cached positions hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refmoe.traces.trace import Run
from refmoe.verifier.diagnosis.grammar.fault import Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory
from refmoe.verifier.diagnosis.grammar.settings import At, setting
from refmoe.verifier.passes import Key

WIDEST = 64
"""The widest window that is tried."""

Mask = Callable[[Any, Any, Any, Run], Any]
"""From the right mask, the positions of queries [T, 1] and of cached tokens [1, S], and the call: another mask."""

MASKS: tuple[tuple[str, float, Mask], ...] = (
    ("each query hides its own token", 4.0, lambda m, p, s, run: keeping(m & (s < p), m)),
    ("every token of the call is seen", 3.0, lambda m, p, s, run: np.ones_like(m)),
    ("one token too many is seen", 4.0, lambda m, p, s, run: m | (s == p + 1)),
    ("the first cached token is hidden", 4.0, lambda m, p, s, run: keeping(m & (slots(m) > 0), m)),
    ("cached tokens are hidden", 3.0, lambda m, p, s, run: m & (slots(m) >= run.past)),
    ("the newest cached token is hidden", 4.0, lambda m, p, s, run: keeping(m & (slots(m) != run.past - 1), m)),
    ("the mask aligned at the top left", 4.0, lambda m, p, s, run: np.tril(np.ones_like(m))),
)
"""Masks by a law: in words, length in bits, mask."""
FIX = "look at how this call's mask is built"


def slots(mask: Any) -> Any:
    """The numbers of the cached positions: integers [S]"""
    return np.arange(mask.shape[1])


def keeping(mask: Any, right: Any) -> Any:
    """The mask, but the right one in rows that would see nothing."""
    return np.where(mask.any(-1, keepdims=True), mask, right)


def _by_law(law: Mask) -> At:
    def mask(lab: Laboratory, key: Key) -> Any:
        run = lab.runs[key[0]]
        shown = law(lab.mask(key), np.asarray(run.positions)[:, None], np.asarray(lab.slots(run))[None, :], run)
        return shown if shown.any(-1).all() else None

    return mask


def _windowed(window: int | None) -> At:
    return lambda lab, key: lab.mask(key, window)


def masks(search: Search) -> Iterator[Fault]:
    """The masks by a law, the windows and the hidden positions that explain the probabilities."""
    if search.step != "attention.probs":
        return
    own = search.lab.config.window
    longest = max(len(search.lab.slots(run)) for run in search.lab.runs.values())
    choices = [(words, bits, _by_law(law)) for words, bits, law in MASKS]
    choices += [("no window", 3.0, _windowed(None))] if own is not None else []
    choices += [
        (f"a window of {window}", 4.0 + 0.02 * window, _windowed(window))
        for window in range(1, min(longest, WIDEST) + 1)
        if window != own
    ]
    seen = {key: ((search.lab.found(key) > 0).any(0), search.wrong_tokens(key)) for key in search.failed}
    for words, bits, mask in choices:
        wanted = [(mask(search.lab, key), *each) for key, each in seen.items()]
        if any(made is not None and (made == shown)[rows].all() for made, shown, rows in wanted):
            yield setting(words, f"in attention, {words}", FIX, bits, mask=mask)
    hidden = _hidden_slots(search, seen)
    if hidden:
        words = f"cached position{'s' * (len(hidden) > 1)} {', '.join(map(str, hidden))} hidden"
        law: Mask = lambda m, p, s, run: keeping(m & ~np.isin(slots(m), hidden), m)  # noqa: E731
        yield setting(words, words, FIX, 4.0 + 3 * len(hidden), mask=_by_law(law))


def _hidden_slots(search: Search, seen: dict[Key, tuple[Any, Any]]) -> list[int]:
    """The cached positions that no wrong row gives a probability, though it should."""
    hidden: set[int] = set()
    for key, (shown, rows) in seen.items():
        lost = (search.lab.mask(key) & ~shown)[rows].any(0)
        hidden |= set(np.flatnonzero(lost).tolist())
    return sorted(hidden) if len(hidden) <= 4 else []
