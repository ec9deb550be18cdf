# SPDX-License-Identifier: Apache-2.0
"""Text of a stranger as neutral text: no character of it acts on a terminal. Imports no library, as errors need it."""

from __future__ import annotations

import codecs
import re

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
