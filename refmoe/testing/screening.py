# SPDX-License-Identifier: Apache-2.0
"""The rows that are judged of an output with many values, of a step that reads no matrix.

Such a step costs a kernel a few operations per value, and its enclosure many times as much. So all values are compared
with a plain evaluation in float32. That comparison gives no verdict, but it ranks the rows. The rows that are farthest
off are judged, and others drawn by a seed. The tests of size and lean take only the rows that were drawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from refmoe.testing.call import Output
from refmoe.verifier.tally import ROWS

MANY = 1 << 18
"""Values from which an output is screened."""
DRAWN = 1 << 16
"""Values, about, of the rows that are drawn."""
FARTHEST = 4
"""Rows that are judged because they are farthest off: by each of two measures."""
PIECE = 1 << 16
"""Values that are compared at a time, so that their arrays stay in the cache."""


@runtime_checkable
class Plain(Protocol):
    """A call that can be evaluated without an enclosure."""

    def some(self, at: Any) -> Plain:
        """The call for some rows only."""

    def plain(self) -> NDArray[Any]:
        """The output in float32, roughly: [rows, ...]"""


def parts(output: Output, seed: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The rows that are drawn, and those that are farthest off, integers each; None where all rows are judged."""
    call, count = output.call, len(output.found)
    if output.cost or output.found.size <= MANY or not isinstance(call, Plain):
        return None
    width = output.found.size // count
    wanted = max(2 * ROWS, DRAWN // width)
    if wanted + 2 * FARTHEST >= count:
        return None
    drawn = np.random.default_rng(seed).choice(count, wanted, replace=False)
    pieces = np.array_split(np.arange(count), -(-count * width // PIECE))
    scores = np.concatenate([_scores(call, output, at) for at in pieces])
    far = np.concatenate([np.argpartition(-each, FARTHEST)[:FARTHEST] for each in scores.T])
    return np.sort(drawn), np.setdiff1d(far, drawn)


def _scores(call: Plain, output: Output, at: NDArray[Any]) -> NDArray[Any]:
    """How far rows are off, relative to each value and to the row: [n, 2]"""
    with np.errstate(all="ignore"):
        plain = call.some(at).plain().reshape(len(at), -1)
        found = output.found[at].astype(np.float32).reshape(len(at), -1)
        apart = np.abs(found - plain)
        typical = np.abs(plain).mean(1, keepdims=True)
        size = np.abs(plain)
        size += typical / 256
        apart /= size
        scores = np.stack([apart.max(1), apart.mean(1)], 1)
    return np.where(np.isnan(scores), np.inf, scores)


def restricted(output: Output, rows: NDArray[Any]) -> Output:
    """The output in some rows."""
    return replace(
        output,
        found=output.found[rows],
        call=output.call.some(rows),
        reads=output.reads[rows],
        where=lambda at: output.where((int(rows[at[0]]), *at[1:])),
        inputs={name: array[rows] for name, array in output.inputs.items()},
    )
