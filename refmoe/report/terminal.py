# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal: no character of a stranger's acts on it, and its width decides how lines are broken."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from refmoe.report.neutral import neutral

WIDE = 118
"""Columns that a whole table needs. A narrower terminal gets fewer columns of the table."""
INDENT = " " * 6
"""The indentation of what belongs to the line above."""


class SafeConsole(Console):
    """A console of Rich on which only its own styles and movements act, never a character of the text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, markup=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=neutral(segment.text))


def open_console(width: int = WIDE, *, soft_wrap: bool = True) -> Console:
    """A console on standard output; in a pipe it is `width` columns wide."""
    console = SafeConsole(soft_wrap=soft_wrap)
    if not console.is_terminal:
        console.width = width
    return console


def error_console() -> Console:
    """A console on standard error."""
    return SafeConsole(stderr=True)


def can_move(console: Console) -> bool:
    """Whether the cursor can be moved, as a bar that grows needs it. FORCE_COLOR asks for colours only."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


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
