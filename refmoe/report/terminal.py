# SPDX-License-Identifier: Apache-2.0
"""The console of a report: a terminal has its own width, a pipe gets room for the whole table and whole lines."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.text import Text

WIDE = 118
"""Columns that a whole table needs. A narrower terminal gets fewer columns of the table."""
INDENT = " " * 6
"""The indentation of what belongs to the line above."""


def open_console(width: int = WIDE, *, soft_wrap: bool = True) -> Console:
    """A console on standard output; in a pipe it is `width` columns wide."""
    console = Console(highlight=False, soft_wrap=soft_wrap)
    if not console.is_terminal:
        console.width = width
    return console


def print_text(console: Console, text: str, style: str = "") -> None:
    """Print plain text: markup or an emoji code within a name is part of the name.

    On a terminal a long line is wrapped between words, and its rest is indented. In a pipe it stays one line.
    """
    lines = [text]
    if console.is_terminal:
        bare = text.lstrip()
        indent = text[: len(text) - len(bare)]
        wrapper = textwrap.TextWrapper(
            width=max(console.width, 40), initial_indent=indent, subsequent_indent=indent or INDENT,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        lines = wrapper.wrap(bare) or [text]
    for line in lines:
        console.print(Text(line, style=style), soft_wrap=True)
