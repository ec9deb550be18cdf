# SPDX-License-Identifier: Apache-2.0
"""The site of the documents: ``python -m sphinx -W -n -c docs . build/site``, with the extra ``docs``.

The source folder is the repository, so a relative link works on the site as it does in the repository.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "refmoe"
copyright = "the authors of refmoe"
extensions = ["myst_parser", "sphinx.ext.autodoc", "docs.bookmaker.site"]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md", "docs/findings/*.md", "docs/book/*.md", "docs/book/*/*.md", "golden/*.md", "golden/vectors/FORMAT.md",
    "refmoe/engines/PROTOCOL.md", "refmoe/suite/pack/PACK.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md",
    "tests/README.md",
]  # fmt: skip
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_title = "refmoe"
html_extra_path = ["site"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"

ARGUMENT = re.compile(r"^([a-z_]+(?:, [a-z_]+)*): (.*)$")
"""A line of a docstring that says what an argument is."""


def lists_of_arguments(_app: Any, what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Turn the lines about arguments into a list, which is how a page shows them."""
    done: list[str] = []
    listed = False
    for line in lines:
        match = ARGUMENT.match(line)
        if match and what in ("function", "method", "class"):
            done += [*([] if listed else [""]), f"* **{match[1]}**: {match[2]}"]
            listed = True
        elif listed and line.startswith(" "):
            done.append(f"  {line.strip()}")
        elif listed and line.strip():
            done += ["", line]
            listed = False
        else:
            done.append(line)
            listed = listed and bool(line.strip())
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in done]


def links_to_folders(_app: Any, _docname: str, source: list[str]) -> None:
    """Show a link to a folder as its text: the site holds files alone."""
    place = ROOT / f"{_docname}.md"

    def shown(match: re.Match[str]) -> str:
        target = (place.parent / match[2].partition("#")[0]).resolve()
        return match[1] if target.is_dir() else match[0]

    source[0] = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", shown, source[0])


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", lists_of_arguments)
    app.connect("source-read", links_to_folders)
