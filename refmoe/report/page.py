# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages: style and script are inside, and no name from a file can act as markup or code."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from refmoe.errors import require
from refmoe.files.reading import own_text
from refmoe.report import wording
from refmoe.report.glossary import TERMS, anchor


def render(template: str, styles: Sequence[str], script: str, what: str, **values: Any) -> str:
    """A page as text, to be written as UTF-8.

    template, styles, script: files of this package.   what: the kind of page, for the error message.
    A content security policy names the page's style and script by their digests and forbids everything else. So a name
    in a trace that looks like code stays a name, and a browser makes no request.
    Raises InputError when Jinja2 is missing.
    """
    jinja2 = require("jinja2", "html", what)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_printable
    )
    environment.globals.update(is_link=wording.is_link, terms=TERMS, anchor=anchor)
    style, code = "\n".join(map(_read, styles)), _read(script)
    digests = {"style": _digest(style), "script": _digest(code)}
    page = environment.from_string(_read(template)).render(style=style, script=code, digests=digests, **values)
    return str(page)


def _printable(value: object) -> object:
    """The value as the template writes it. Text gets its control characters escaped, unless it is our own markup."""
    return wording.visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _read(name: str) -> str:
    return own_text("refmoe.report", name).strip()


def _digest(text: str) -> str:
    return "sha256-" + b64encode(sha256(text.encode()).digest()).decode()
