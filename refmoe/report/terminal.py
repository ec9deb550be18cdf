# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal: no character of a stranger's acts on it, and its width decides how lines are broken."""

from __future__ import annotations

import codecs
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

WIDE = 118
"""Columns that a whole table needs. A narrower terminal gets fewer columns of the table."""
INDENT = " " * 6
"""The indentation of what belongs to the line above."""
LONGEST = 2000
"""The most characters of a sentence that is printed. What a stranger wrote may be of any length."""

CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # ASCII's controls except tab and newline, and those above ASCII
    "|[\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"  # direction of writing, separators of lines
    "|[\ud800-\udfff]"  # bytes of a file name that are not text
)
ASCII = {
    "…": ".", "·": ".", "—": "-", "✕": "x", "✓": "v", "≠": "!", "\N{MULTIPLICATION SIGN}": "x",
    "█": "#", "▓": "%", "▒": "=", "░": "-", "▁": "_", "■": "#", "▲": "^", "◆": "*", "○": "o", "━": "=", "─": "-",
    "│": "|", "╸": "-", "╺": "-",
}  # fmt: skip
"""Stand-ins for the marks of reports, of the same width, on a terminal that lacks them."""
READABLE = "refmoe-readable"
"""The name of the error handler for characters that an encoding lacks."""


def neutral(text: str) -> str:
    """The text with each character that acts on a terminal as its number, except tab and newline."""
    return CONTROL.sub(_number, text)


def _number(found: re.Match[str]) -> str:
    """The character as JSON escapes it, but a byte of a file name that is no text as a byte."""
    code = ord(found.group())
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def sentence(text: str) -> str:
    """A message as one neutral line of bounded length."""
    line = neutral(text.replace("\n", "\\n"))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 300]}... ({len(line)} characters) ...{line[-200:]}"


def _readable(error: UnicodeError) -> tuple[str, int]:
    """A stand-in for a mark that an encoding lacks; the number of any other character."""
    if isinstance(error, UnicodeEncodeError) and all(mark in ASCII for mark in error.object[error.start : error.end]):
        return "".join(ASCII[mark] for mark in error.object[error.start : error.end]), error.end
    replaced, end = codecs.backslashreplace_errors(error)
    return str(replaced), end


codecs.register_error(READABLE, _readable)


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
