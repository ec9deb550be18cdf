# SPDX-License-Identifier: Apache-2.0
"""The site of the documents, built once for all tests of it, and what its pages link to."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html import unescape
from pathlib import Path
from urllib.parse import unquote

from refmoe.files.lock import locked
from tests.tour import ROOT

COMMAND = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-c", "docs")
"""As CONTRIBUTING.md has it, and quiet."""
LINK = re.compile(r'<a [^>]*?href="([^"]*)"')
ANCHOR = re.compile(r'\bid="([^"]*)"')
MAIN = re.compile(r"<article.*?</article>", re.DOTALL)


def build(place: Path) -> tuple[Path, str]:
    """The folder of the site, and what the build complained of.   place: a folder that all test processes share"""
    with locked(place / "site"):
        site, said = place / "site" / "html", place / "site" / "said.txt"
        if not said.exists():
            done = subprocess.run(
                [*COMMAND, "-d", str(place / "site" / "doctrees"), ".", str(site)],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            said.write_text(done.stderr or ("" if done.returncode == 0 else f"status {done.returncode}"))
        return site, said.read_text()


def links(page: Path) -> list[str]:
    """The links in the content of a page, without its sidebar."""
    content = MAIN.search(page.read_text(encoding="utf-8"))
    return [unescape(link) for link in LINK.findall(content[0])] if content else []


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page."""
    return frozenset(map(unescape, ANCHOR.findall(page.read_text(encoding="utf-8"))))


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a link of a page leads to a file and an anchor that exist. An address elsewhere is not tried."""
    if re.match(r"[a-z]+:", link):
        return True
    name, _, anchor = unquote(link).partition("#")
    target = (page.parent / name).resolve() if name else page
    return target.is_file() and (not anchor or anchor in anchors(target))
