"""The console of a report: a terminal has its own width, a pipe gets room for the whole table."""

from __future__ import annotations

from rich.console import Console

WIDE = 118
"""Columns that a whole table needs. A narrower terminal gets fewer columns of the table."""


def open_console(width: int = WIDE, *, soft_wrap: bool = True) -> Console:
    """A console on standard output; in a pipe it is `width` columns wide."""
    console = Console(highlight=False, soft_wrap=soft_wrap)
    if not console.is_terminal:
        console.width = width
    return console
