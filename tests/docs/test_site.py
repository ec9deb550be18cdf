# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, and every relative link and every anchor of a page exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tour import BLOCK, ROOT

PAGES = [
    ROOT / name
    for name in (
        "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "tests/README.md",
        "refmoe/engines/PROTOCOL.md", "golden/FORMAT.md", "golden/arithmetic.md", "golden/dot.md",
        "golden/elementary.md", "golden/vectors/FORMAT.md",
    )
] + sorted((ROOT / "docs").glob("*.md"))  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    """A page that no list names is a page that nobody finds."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {line.strip() for line in index.splitlines()}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_the_site_builds_without_a_warning(built: tuple[Path, str]) -> None:
    site, said = built
    assert said == ""
    assert (site / "docs" / "quickstart.html").exists()
    assert (site / "index.html").exists()
