# SPDX-License-Identifier: Apache-2.0
"""Markdown, as GitHub and GitLab read it: tables, and texts of strangers that stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$^&!@])")
"""The characters that begin markup or a name that is called. A backslash before one makes it text."""
BEGINS_A_LINE = re.compile(r"^(\d*)([-+=.)])")
"""The marks of a list, a rule or a heading, which are markup at the beginning of a line."""
BEGINS_A_LINK = re.compile(r"(?<=:)/(?=/)|(?<=\bwww)\.", re.IGNORECASE)


def plain(text: str) -> str:
    """Any text, such that Markdown shows it as it stands, on one line and without links."""
    text = SPECIAL.sub(r"\\\1", " ".join(text.split()))
    return BEGINS_A_LINK.sub(r"\\\g<0>", BEGINS_A_LINE.sub(r"\1\\\2", text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.   head, rows: cells in Markdown. A line break or a bar in one does not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(markdown: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(markdown.split()))
