# SPDX-License-Identifier: Apache-2.0
"""Tables of commands: a row is a line. A terminal cuts long cells, or wraps them; a pipe gets whole lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from rich.console import Console
from rich.text import Text

from refmoe.report.terminal import SafeConsole

GAP = 2
LEAST, READABLE = 12, 32
"""A column is made no narrower than the first, and its text is readable from the second on."""
CUT = "…"


def console() -> Console:
    """A console on standard output that breaks no line."""
    return SafeConsole(soft_wrap=True)


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    styles: Sequence[str | None] = (),
    right: Sequence[int] = (),
    optional: Sequence[int] = (),
    wrap: bool = False,
) -> None:
    """Print a table.

    headings: all empty: no line for them   styles: of the rows, names of Rich; empty: none
    right: the columns that are aligned right
    optional: the columns that a narrow terminal does without, in this order
    wrap: on a terminal, break long cells into lines instead of cutting them
    """
    out = console()
    kept = columns(natural(headings, rows), optional, out.width if out.is_terminal else None)
    headings, rows = [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]
    right = [kept.index(i) for i in right if i in kept]
    if title:
        out.print(Text(title, style="bold"))
    widths = fitting(natural(headings, rows), out.width if out.is_terminal else None)
    if any(headings):
        out.print(Text(line(headings, widths, right), style="bold"))
    for row, style in zip_longest(rows, styles):
        for each in lines(row, widths, right) if wrap else [line(row, widths, right)]:
            out.print(Text(each, style=style or ""))


def natural(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of the longest cell of each column."""
    return [max(map(len, column)) for column in zip(headings, *rows, strict=True)]


def columns(widths: list[int], optional: Sequence[int], room: int | None) -> list[int]:
    """The columns to print: optional ones are left out while the others have no room for readable text."""
    kept, left = [*range(len(widths))], [*optional]
    while room is not None and left and sum(min(widths[i], READABLE) + GAP for i in kept) - GAP > room:
        kept.remove(left.pop(0))
    return kept


def fitting(widths: list[int], room: int | None) -> list[int]:
    """The widths, the widest column made narrower until a row fits; the first, which has names, comes last.

    room: the columns of the terminal; None: any number
    """
    widths = [*widths]
    while room is not None and sum(widths) + GAP * (len(widths) - 1) > room:
        others = [i for i in range(1, len(widths)) if widths[i] > LEAST]
        if not others and widths[0] <= LEAST:
            break
        widths[max(others, key=lambda i: widths[i]) if others else 0] -= 1
    return widths


def line(cells: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> str:
    """A row in one line."""
    cut = [
        cell if len(cell) <= width else cell[: width - 1].rstrip() + CUT
        for cell, width in zip(cells, widths, strict=True)
    ]
    padded = [
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cut, widths, strict=True))
    ]
    return (" " * GAP).join(padded).rstrip()


def lines(cells: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> list[str]:
    """A row in as many lines as its longest cell needs."""
    wrapped = [textwrap.wrap(cell, max(width, 1)) or [""] for cell, width in zip(cells, widths, strict=True)]
    return [line(parts, widths, right) for parts in zip_longest(*wrapped, fillvalue="")]
