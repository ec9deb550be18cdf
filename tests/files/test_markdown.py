# SPDX-License-Identifier: Apache-2.0
"""Markdown of any text, read by a parser of somebody else: it is shown as it stands."""

from __future__ import annotations

from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refmoe.files.markdown import plain, table

markdown_it = pytest.importorskip("markdown_it")

ODD = (
    "<script>alert(1)</script>", "[a](http://x)", "![a](x)", "**b**", "`c`", "| d |", "# e", "- f", "1. g", "+ h",
    "> i", "&amp;", "\\", "\\\\|", "https://example.org/x", "www.example.org", "me@example.org", "~~j~~", "$k$",
    "\n\n    l", "***", "---", "===", "[^1]: m", "<https://n>", ":smile:", "a  \nb", "\t", "*",
)  # fmt: skip


def rendered(markdown: str) -> str:
    return str(markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def shown(markdown: str) -> str:
    """The text of one paragraph that has nothing but text."""
    html = rendered(markdown).strip()
    assert html.startswith("<p>") == bool(markdown), html
    inner = html.removeprefix("<p>").removesuffix("</p>")
    assert "<" not in inner, html
    return unescape(inner)


TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(ODD)).map(" ".join), st.lists(st.sampled_from(ODD)).map("".join))


@given(TEXTS.filter(lambda text: text.replace("\0", "").isprintable() or not text.strip()))
def test_any_text_is_shown_as_it_stands(text: str) -> None:
    assert shown(plain(text)) == " ".join(text.split()).replace("\0", "\ufffd")


@pytest.mark.parametrize("text", ODD)
def test_text_with_markup_is_text(text: str) -> None:
    assert shown(plain(text)) == " ".join(text.split())


@given(st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=4))
def test_a_cell_does_not_end_in_its_middle(rows: list[list[str]]) -> None:
    html = rendered(table(("a", "b"), [[plain(text) for text in row] for row in rows]))
    assert html.count("<td>") == 2 * len(rows)
    assert html.count("<th>") == 2
    assert "<p>" not in html
    assert table(("a", "b"), [["x | y", "z\n\nw"]]).splitlines()[2:] == ["| x \\| y | z w |"]
