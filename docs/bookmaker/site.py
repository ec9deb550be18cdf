# SPDX-License-Identifier: Apache-2.0
"""Extend Sphinx: write the book before it reads, typeset equations as MathML, link the terms of the glossary.

Nothing here asks the network for anything, and a page needs no script to show an equation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from docs.bookmaker.chapters import book

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "book"
"""The folder of the written pages. Git ignores it."""
GLOSSARY = "docs/glossary"
LINKED = "docs/book/"
"""The pages whose terms are linked."""
NOT_LINKED = (nodes.literal, nodes.reference, nodes.title, nodes.math, nodes.math_block, nodes.literal_block)


def write_book(_app: Any) -> None:
    """Write the pages that have changed, and remove those that are gone."""
    made = book(ROOT)
    for path in FOLDER.rglob("*.md"):
        if path.relative_to(FOLDER).as_posix() not in made:
            path.unlink()
    for name, text in made.items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


# ---- equations


def inline_equation(self: Any, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_equation(self: Any, node: nodes.math_block) -> None:
    """An equation in a frame that a keyboard can scroll, since a telephone is narrower than some."""
    self.body.append(
        self.starttag(node, "div", CLASS="math scroll", tabindex="0", role="group", **{"aria-label": "equation"})
    )
    self.body.append(tex2mathml(node.astext(), as_block=True))
    self.body.append("</div>\n")
    raise nodes.SkipNode


# ---- the glossary


def terms_of(doctree: nodes.document) -> dict[str, str]:
    """Give each term of the glossary an anchor. Returns the terms, each with its anchor."""
    found = {}
    for row in doctree.findall(nodes.row):
        if isinstance(row.parent, nodes.tbody):
            cell = row.children[0]
            assert isinstance(cell, nodes.entry)
            term = cell.astext()
            found[term] = f"term-{re.sub(r'[^a-z]+', '-', term.lower())}"
            cell["ids"].append(found[term])
    return found


def note_terms(app: Any, doctree: nodes.document) -> None:
    if app.env.docname == GLOSSARY:
        app.env.refmoe_terms = terms_of(doctree)


def link_terms(app: Any, doctree: nodes.document, docname: str) -> None:
    """Link the first use of each term on a page of the book to its definition."""
    terms: dict[str, str] = getattr(app.env, "refmoe_terms", {})
    if not docname.startswith(LINKED) or not terms:
        return
    pattern = re.compile(rf"\b({'|'.join(sorted(map(re.escape, terms), key=len, reverse=True))})(s?)\b")
    glossary = app.builder.get_relative_uri(docname, GLOSSARY)
    seen: set[str] = set()
    for node in [*doctree.findall(nodes.Text)]:
        if not any(isinstance(each, NOT_LINKED) for each in ancestors(node)):
            parts = split(node.astext(), pattern, seen)
            if len(parts) > 1:
                node.parent.replace(node, [as_node(part, terms, glossary) for part in parts])


def ancestors(node: nodes.Node) -> list[nodes.Node]:
    """The nodes around a node."""
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def split(text: str, pattern: re.Pattern[str], seen: set[str]) -> list[tuple[str, str]]:
    """A text in pieces, each with the term that it is, or with "". A term that was seen before is no piece."""
    found, start = [], 0
    for match in pattern.finditer(text):
        if match[1] not in seen:
            seen.add(match[1])
            found += [(text[start : match.start()], ""), (match[0], match[1])]
            start = match.end()
    return [each for each in (*found, (text[start:], "")) if each[0]]


def as_node(part: tuple[str, str], terms: dict[str, str], glossary: str) -> nodes.Node:
    words, term = part
    if not term:
        return nodes.Text(words)
    return nodes.reference("", words, refuri=f"{glossary}#{terms[term]}", internal=True, classes=["term"])


def setup(app: Any) -> None:
    """The hooks of the book."""
    app.connect("builder-inited", write_book)
    app.connect("doctree-read", note_terms)
    app.connect("doctree-resolved", link_terms)
    app.add_html_math_renderer("mathml", (inline_equation, None), (block_equation, None))
