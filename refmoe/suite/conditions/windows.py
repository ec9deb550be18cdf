# SPDX-License-Identifier: Apache-2.0
"""Conditions of the sliding window and of positions."""

from __future__ import annotations

from itertools import pairwise

from refmoe.suite.conditions.observed import Observed, Predicate, condition


@condition("window", "SWA", "the window hides a cached token from a query", "SWA")
def _window(seen: Observed) -> bool:
    window = seen.config.window
    return window is not None and any(run.past + len(run.tokens) > window for run in seen.runs)


@condition("window", "T=W-1", "a first call one token short of the window", "SWA")
def _one_short(seen: Observed) -> bool:
    window = seen.config.window
    return window is not None and window - 1 in seen.lengths()


@condition("window", "T=W", "a first call that fills the window", "SWA")
def _filled(seen: Observed) -> bool:
    return seen.config.window is not None and seen.config.window in seen.lengths()


@condition("window", "T=W+1", "a first call one token longer than the window", "SWA")
def _one_over(seen: Observed) -> bool:
    return seen.config.window is not None and seen.config.window + 1 in seen.lengths()


@condition("window", "T=3W", "a first call three windows long", "SWA")
def _three_windows(seen: Observed) -> bool:
    return seen.config.window is not None and 3 * seen.config.window in seen.lengths()


@condition("window", "DECODE-ACROSS-W", "a decode call fills the window, the next is the first to lose a token", "SWA")
def _decode_across(seen: Observed) -> bool:
    steps = {(run.sequence, run.past + 1) for run in seen.runs if run.op == "decode"}
    window = seen.config.window
    return window is not None and any({(i, window), (i, window + 1)} <= steps for i in seen.sequences)


@condition("window", "CHUNK>W", "two calls in a row on one sequence, each longer than the window", "SWA", "CHUNK")
def _chunk_over(seen: Observed) -> bool:
    window = seen.config.window
    return window is not None and any(
        len(a.tokens) > window and len(b.tokens) > window for runs in seen.sequences.values() for a, b in pairwise(runs)
    )


def _across(position: int) -> Predicate:
    """A predicate: a sequence has tokens on both sides of a position. So a table that ends or wraps there shows."""

    def holds(seen: Observed) -> bool:
        spans = [[p for run in runs for p in run.positions] for runs in seen.sequences.values()]
        return any(min(span) < position < max(span) for span in spans)

    return holds


for _position in (256, 2048, 4096, 32768):
    condition("window", f"P>{_position}", f"a sequence that crosses position {_position}", "LONG")(_across(_position))


@condition("window", "LONG-ROW", "a query that sees at least 64 tokens", "LONG")
def _long_row(seen: Observed) -> bool:
    rows = max(run.past + len(run.tokens) for run in seen.runs)
    return min(rows, seen.config.window or rows) >= 64
