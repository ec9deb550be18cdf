# SPDX-License-Identifier: Apache-2.0
"""Text files, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from refmoe.files.atomic import replacing


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises InputError when it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
