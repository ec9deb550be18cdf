# SPDX-License-Identifier: Apache-2.0
"""Edits: deliberate changes to synthetic weights, which their formula cannot produce.

Two equal rows of a router matrix or an embedding of ones are examples. Edits are applied in order, each to the result
of the edits before it:

    parameter   which parameters: a shell pattern over their names; at least one must match
    row         only this row of a matrix; without it, every row
    columns     only columns first, first + 1, ... stop - 1, as [first, stop]; without it, every column

and one of

    value       every element becomes this number
    values      the elements of the row, or of the gain, become these numbers
    magnitude   every element becomes this number, negative where the element was
    exponent    every element becomes the formula's, with this power of two
    copy        the row becomes equal to this row, as the edits before have left it
    entries     the elements [row, column, number] of this list; neither row nor columns are given

Numbers must be exact in bfloat16.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.checkpoints.weight import BFLOAT16
from refmoe.checkpoints.weight_formula import EXPONENTS
from refmoe.errors import InputError

ACTIONS = ("value", "values", "magnitude", "exponent", "copy", "entries")
"""The actions of edits. The table of an edit has exactly one of them."""


@dataclass(frozen=True)
class Edit:
    """One change to the elements of a parameter."""

    action: str
    given: Any
    """The value of the action's field."""
    row: int | None = None
    columns: tuple[int, int] | None = None

    def apply(self, block: Any, rows: Any, formula: Any, copied: Any) -> None:
        """Change rows of a matrix in place. A gain is a matrix of one row.

        block: the rows [n, columns]   rows: their indices, integers [n]   copied: the row to copy [columns], or None
        formula: the rows with this edit's exponent [n, columns], or None
        """
        if self.action == "entries":
            for row, column, number in self.given:
                block[rows == row, column] = number
            return
        here = np.ix_(rows == (rows if self.row is None else self.row), np.arange(block.shape[1])[self._slice()])
        if self.action == "magnitude":
            block[here] = np.copysign(np.float32(self.given), block[here])
        elif self.action == "exponent":
            block[here] = formula[here]
        else:
            block[here] = copied[self._slice()] if self.action == "copy" else np.asarray(self.given, np.float32)

    def _slice(self) -> slice:
        return slice(*self.columns) if self.columns else slice(None)


def parse_edits(edits: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Edit]]:
    """The edits of each parameter, in order. shapes: canonical name to shape of every parameter.

    Raises InputError, which names the edit and its fault.
    """
    parsed: dict[str, list[Edit]] = {}
    for i, table in enumerate(edits):
        try:
            for name, edit in _parse_edit(table, shapes):
                parsed.setdefault(name, []).append(edit)
        except ValueError as error:
            raise InputError(f"edits[{i}]: {error}") from None
    return parsed


def _parse_edit(table: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Edit]]:
    if not isinstance(table, Mapping):
        raise ValueError(f"{table!r} is not a table")
    actions = [name for name in ACTIONS if name in table]
    if len(actions) != 1:
        raise ValueError(f"has {' and '.join(actions) or 'none'} of {', '.join(ACTIONS)}, but one was expected")
    action = actions[0]
    for field in table.keys() - {"parameter", "row", "columns", action}:
        raise ValueError(f"unknown field '{field}'")
    pattern, row, columns, given = (table.get(field) for field in ("parameter", "row", "columns", action))
    names = [name for name in shapes if isinstance(pattern, str) and fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(f"parameter = {pattern!r} matches no parameter of this model")
    if action == "entries" and not (row is None and columns is None):
        raise ValueError("entries name their own rows and columns, so 'row' and 'columns' have no place beside them")
    if action == "copy" and row is None:
        raise ValueError("copy needs a 'row' to copy to")
    for name in names:
        shape = shapes[name]
        _check_place(name, shape, row, columns)
        _check_given(name, shape, row, columns, action, given)
        yield name, Edit(action, given, row, None if columns is None else tuple(columns))


def _is_index(value: Any, stop: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < stop


def _check_place(name: str, shape: tuple[int, ...], row: Any, columns: Any) -> None:
    if row is not None and (len(shape) == 1 or not _is_index(row, shape[0])):
        rows = "no rows" if len(shape) == 1 else f"rows 0 to {shape[0] - 1}"
        raise ValueError(f"row = {row!r}, but {name} has {rows}")
    width = shape[-1]
    if columns is not None:
        listed = isinstance(columns, list | tuple) and len(columns) == 2
        if not listed or not all(_is_index(at, width + 1) for at in columns) or columns[0] >= columns[1]:
            raise ValueError(f"columns = {columns!r}, but [first, stop] within the {width} of {name} was expected")


def _check_given(name: str, shape: tuple[int, ...], row: Any, columns: Any, action: str, given: Any) -> None:
    if action == "copy" and not _is_index(given, shape[0]):
        raise ValueError(f"copy = {given!r}, but {name} has rows 0 to {shape[0] - 1}")
    if action == "exponent" and (len(shape) == 1 or type(given) is not int or given not in EXPONENTS):
        where = f"{name} is a gain, which has none" if len(shape) == 1 else "an integer from -126 to 120 was expected"
        raise ValueError(f"exponent = {given!r}, but {where}")
    if action in ("value", "magnitude"):
        _check_number(action, given)
        if action == "magnitude" and given < 0:
            raise ValueError(f"magnitude = {given!r} is negative")
    if action == "values":
        first, stop = columns or (0, shape[-1])
        if len(shape) == 2 and row is None:
            raise ValueError(f"values need a 'row', as {name} is a matrix")
        if not isinstance(given, list | tuple) or len(given) != stop - first:
            raise ValueError(f"values of {name} must be a list of {stop - first} numbers")
        for number in given:
            _check_number("values", number)
    if action == "entries":
        if not isinstance(given, list | tuple) or len(shape) == 1:
            raise ValueError(f"entries must be a list, and {name} a matrix")
        for entry in given:
            if (
                not isinstance(entry, list | tuple) or len(entry) != 3
                or not _is_index(entry[0], shape[0]) or not _is_index(entry[1], shape[1])
            ):  # fmt: skip
                raise ValueError(f"entry {entry!r} is not [row, column, number] within {name} of {list(shape)}")
            _check_number("entries", entry[2])


def _check_number(action: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{action}: {number!r} is not a finite number")
    with np.errstate(over="ignore"):
        if float(np.float64(number).astype(BFLOAT16)) != number:
            raise ValueError(f"{action}: {number!r} is not exact in bfloat16")
