# SPDX-License-Identifier: Apache-2.0
"""Foreign text in messages: on one line, without control characters, cut short if it is long."""

from __future__ import annotations

import json
from typing import Any


def one_line(error: object) -> str:
    """The message of another library's error, on one line, without control characters, cut short if it is long."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else json.dumps(c)[1:-1] for c in str(error)[:10_000])
    text = " ".join(text.split())
    return text if len(text) <= 600 else f"{text[:500]}..."


def quoted(name: str) -> str:
    """A name from a file, in quotes, on one line, without control characters, cut short if it is long."""
    text = json.dumps(name)[1:-1]
    return f"'{text}'" if len(text) <= 200 else f"'{text[:180]}...' ({len(name)} characters)"


def shown(value: Any) -> str:
    """A value of JSON or TOML as one line of text, cut short if it is long."""
    try:
        text = json.dumps(value)
    except (RecursionError, TypeError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
