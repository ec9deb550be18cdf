# SPDX-License-Identifier: Apache-2.0
"""The rows or columns that are judged of a large output.

An enclosure costs many times the step itself. So all values of a large output are compared with a plain evaluation.
That comparison gives no verdict, but it ranks the rows, or the columns. Those that are farthest off are judged, and
others drawn by a seed. The tests of size and lean take only those that were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.arithmetic.formats import OF_DTYPE, Format
from refmoe.testing.call import Change, Output, Plain
from refmoe.testing.checking import Parts
from refmoe.verifier.findings import Check
from refmoe.verifier.tally import ROWS

MANY = 1 << 15
"""The work from which an output is screened: its values, each counted once more for every `TERMS` terms."""
TERMS = 16
"""Terms of a sum whose bounds cost as much as the tests of one value."""
ALONE = 4
"""The work of a value that is no sum: a plain evaluation costs far less than its bounds."""
SHARE = 16
"""One in so many rows or columns is drawn, where there are enough rows for the tests of size and lean."""
SINGLE = 64
"""One in so many is drawn, where there are too few rows for these tests."""
FEWEST = 4
"""The fewest that are drawn."""
DRAWN = 1 << 12
"""The fewest values that are drawn for the tests of size and lean."""
FARTHEST = 2
"""Rows or columns that are judged because they are farthest off: by each of three measures."""
PIECE = 1 << 16
"""Values that are compared at a time, so that their arrays stay in the cache."""
SHOWN = 1 << 18
"""Values of a failure of a step without a matrix, in whose rows its cause is searched."""


def parts(output: Output, format: Format, seed: int) -> Parts | None:
    """The rows or columns that are drawn, and those that are farthest off; None where all rows are judged.

    format: the dtype that the policy has for the output
    """
    call, size = output.call, output.found.size
    if not isinstance(call, Plain) or size * (ALONE if call.terms == 1 else 1 + call.terms // TERMS) < MANY:
        return None
    count = output.found.shape[call.axis]
    if len(output.found) >= ROWS:
        wanted = max(count // SHARE, FEWEST, -(-DRAWN * count // size), 0 if call.axis else ROWS + 2)
    else:
        wanted = max(count // SINGLE, FEWEST)
    if 4 * (wanted + FARTHEST) >= 3 * count:
        return None
    scores = _scores(call, output, format)
    if not np.isfinite(scores).all():
        return None  # such a rank says nothing
    rng = np.random.default_rng(seed)
    drawn = rng.choice(count, wanted, replace=False)
    far = np.concatenate([np.argpartition(-each, FARTHEST)[:FARTHEST] for each in scores])
    columns = None
    if call.axis == 0 and call.narrow(slice(None)) is not None:
        across = output.found.shape[1]
        few = max(FEWEST, -(-DRAWN * count * across // (size * wanted)))
        columns = np.sort(rng.choice(across, few, replace=False)) if 2 * few < across else None
    # a row of which only some columns are drawn is judged again if it is far off
    return Parts(call.axis, np.sort(drawn), np.setdiff1d(far, drawn) if columns is None else np.unique(far), columns)


def _scores(call: Plain, output: Output, format: Format) -> NDArray[Any]:
    """How far rows or columns are off, relative to each value and to the row: [3, n]"""
    found = output.found
    dtype = np.float64 if found.dtype == np.float64 else np.float32
    parts = []
    with np.errstate(all="ignore"):
        whole = call.plain(dtype) if output.cost else None  # a matrix is read once
        for at in _pieces(found):
            some = call.some(at)
            plain = some.plain(dtype) if whole is None else whole[at]
            parts.append(_measures(found[at], (plain, some.size()), format, call.axis))
        if call.axis == 0:
            return np.concatenate(parts, axis=1)
        value, mean, row, size = (np.array(each) for each in zip(*parts, strict=True))
        # errors of a product grow with its column: its mean size, of which a few rows do not say much
        return np.stack([value.max(0), mean.sum(0), row.max(0) / (size.sum(0) + FEWEST)])


def _pieces(found: NDArray[Any]) -> Iterator[slice]:
    step = max(1, PIECE * len(found) // found.size)
    return (slice(start, start + step) for start in range(0, len(found), step))


def _measures(
    found: NDArray[Any], right: tuple[NDArray[Any], NDArray[Any] | None], format: Format, axis: int
) -> NDArray[Any]:
    """Measures of the distance of values, along the other axis: [3, n] for rows, [4, n] for columns or heads.

    right: the plain evaluation, and the size of the errors, if the call has one
    """
    plain = right[0].reshape(len(found), -1)
    y = found.astype(plain.dtype, copy=False).reshape(plain.shape)
    apart = y - plain
    np.abs(apart, out=apart)
    _without_rounding(apart, y, OF_DTYPE[found.dtype], format)
    size = np.abs(plain)
    typical = np.maximum(size.mean(1, keepdims=True), np.finfo(plain.dtype).tiny)
    by_place = (len(found), found.shape[1] if axis else 1, -1)  # rows, then columns or heads, then what these have
    others = (0, 2) if axis else (1, 2)
    row = (apart / typical).reshape(by_place).max(others)
    measures = [(size / typical).reshape(by_place).mean(2).sum(0)] if axis else []
    if right[1] is None:
        size += typical / 256
    else:
        size = np.maximum(right[1].reshape(plain.shape), np.finfo(plain.dtype).tiny)
    apart /= size
    apart = apart.reshape(by_place)
    return np.stack([apart.max(others), apart.sum(others), row, *measures])


def _without_rounding(apart: NDArray[Any], y: NDArray[Any], stored: Format, format: Format) -> None:
    """Take half a spacing of the coarser dtype from the distances of the values that it holds, in place.

    apart, y: float32 [n, m], the values in y   stored: their dtype   format: that of the policy
    """
    least = min(stored.precision, format.precision)
    if y.dtype != np.float32 or least >= 24:
        return
    bits = y.view(np.uint32)
    half = (bits & np.uint32(0x7F800000)).view(np.float32) * np.float32(2.0**-least)
    if stored.precision > least:
        half[(bits & np.uint32((1 << (24 - least)) - 1)) != 0] = 0
    np.subtract(apart, half, out=apart)
    np.maximum(apart, 0, out=apart)


def shown(output: Output, check: Check, seed: int) -> tuple[Output, Check]:
    """The output in the rows in which the cause of a failure is searched, and the check with its worst element there.

    check: of all rows
    """
    count, size, worst = len(output.found), output.found.size, check.worst
    wanted = max(2 * ROWS, SHOWN * count // size)
    if output.cost or size <= SHOWN or wanted >= count:
        return output, check
    rows = np.random.default_rng(seed).choice(count, wanted, replace=False)
    rows = np.unique(rows) if worst is None else np.union1d(rows, worst.where[:1])
    if worst is not None:
        worst = replace(worst, where=(int(np.searchsorted(rows, worst.where[0])), *worst.where[1:]))
    return restricted(output, rows), replace(check, worst=worst)


def restricted(output: Output, rows: NDArray[Any]) -> Output:
    """The output in some rows."""
    return replace(
        output,
        found=output.found[rows],
        call=output.call.some(rows),
        reads=tuple(array[rows] for array in output.reads),
        where=lambda at: output.where((int(rows[at[0]]), *at[1:])),
        changes=lambda: (Change(each.name, each.call.some(rows), each.bug) for each in output.changes()),
        inputs={name: array[rows] for name, array in output.inputs.items()},
    )
