# SPDX-License-Identifier: Apache-2.0
"""Tables of commands: a row is a line. A terminal cuts long cells, or wraps them; a pipe gets whole lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from rich.console import Console
from rich.text import Text

GAP = 2
LEAST = 12
"""A column is made no narrower than this, or than its longest cell."""
CUT = "…"


def console() -> Console:
    """A console on standard output that breaks no line."""
    return Console(highlight=False, soft_wrap=True)


def print_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    styles: Sequence[str | None] = (),
    right: Sequence[int] = (),
    wrap: bool = False,
) -> None:
    """Print a table.

    headings: all empty: no line for them   styles: of the rows, names of Rich; empty: none
    right: the columns that are aligned right   wrap: on a terminal, break long cells into lines instead of cutting them
    """
    out = console()
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


def fitting(widths: list[int], room: int | None) -> list[int]:
    """The widths, the widest column made narrower until a row fits.   room: columns of the terminal; None: any"""
    widths = [*widths]
    while room is not None and sum(widths) + GAP * (len(widths) - 1) > room and max(widths) > LEAST:
        widths[max(range(len(widths)), key=lambda i: widths[i])] -= 1
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
    wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    return [line(parts, widths, right) for parts in zip_longest(*wrapped, fillvalue="")]
