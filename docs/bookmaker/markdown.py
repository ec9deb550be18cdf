# SPDX-License-Identifier: Apache-2.0
"""The pieces of a page in Markdown: links, tables, code, and texts of the code as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from refmoe.files import markdown

BOOK = "/docs/book"
"""The place of the book's pages in the sources of the site."""
SPECIAL = re.compile(r"([\\*_{}\[\]<>#|~$^])")


def text(words: str) -> str:
    """A sentence of the code, such that Markdown shows it as it stands. What is between backticks stays code."""
    parts = " ".join(words.split()).split("`")
    if len(parts) % 2 == 0:  # a backtick that is never closed
        return SPECIAL.sub(r"\\\1", "'".join(parts))
    return "`".join(part if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


def code(words: object) -> str:
    """A name as code. In a cell of a table, too."""
    return f"`{str(words).replace('|', chr(92) + '|')}`"


def link(words: str, target: str) -> str:
    """A link. A target that begins with "/" is a source file of the site; any other one is a page of the book."""
    return f"[{words}]({target if target.startswith(('/', 'http')) else f'{BOOK}/{target}'})"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or nothing where it has no row."""
    lines = [*rows]
    return markdown.table(head, lines) if lines else ""


def listed(items: Iterable[str]) -> str:
    """A list with a point for each item."""
    return "\n".join(f"- {item}" for item in items)


def block(language: str, source: str, first: int | None = None) -> str:
    """A block of code.   first: the number of its first line, where numbers are shown"""
    numbers = "" if first is None else f":lineno-start: {first}\n"
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", source) or [""]))
    return f"{fence}{{code-block}} {language}\n{numbers}{source}\n{fence}"


def folded(summary: str, content: str, kind: str = "") -> str:
    """Content that a reader opens.   kind: for the style sheet, which leaves ``exact`` values out on paper"""
    return f"<details{f' class={kind}' if kind else ''}>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def page(*parts: str, orphan: bool = False) -> str:
    """A page of these parts. Empty ones are left out.   orphan: whether no list of contents names it"""
    head = ["---\norphan: true\n---"] if orphan else []
    return "\n\n".join([*head, *(part for part in parts if part)]) + "\n"


def contents(pages: Iterable[str], caption: str = "", hidden: bool = True) -> str:
    """A list of contents, by names of pages.   hidden: whether only the sidebar shows it"""
    options = (f":caption: {caption}\n" if caption else "") + (":hidden:\n" if hidden else "")
    return "```{toctree}\n" + options + ":maxdepth: 1\n\n" + "\n".join(f"{BOOK}/{each}" for each in pages) + "\n```"


def sentence(count: int, one: str, many: str = "") -> str:
    """A count with its noun: ``1 case``, ``3 cases``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def minutes(source: str) -> int:
    """The time that a page takes: 200 words a minute, and a line of code in four seconds. At least one minute."""
    blocks = re.findall(r"^```+\{code-block\} python\n.*?^```+$", source, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"<details.*?</details>", "", source, flags=re.DOTALL)
    for each in blocks:
        prose = prose.replace(each, "")
    lines = sum(each.count("\n") for each in blocks)
    return max(1, round(len(prose.split()) / 200 + lines * 4 / 60))
