# SPDX-License-Identifier: Apache-2.0
"""A verification as one JSON object, with the fields of `refmoe.verifier.findings`.

The file verification.schema.json explains each field.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from refmoe.files.parsing import strict_json
from refmoe.files.reading import own_text
from refmoe.report.json_text import json_text
from refmoe.verifier.findings import Report

FORMAT_VERSION = "2"


def to_json(report: Report) -> str:
    """The whole report. Each check, decision and code has a line of its own, so that text tools can search it."""
    lines = [f'"format_version": {json_text(FORMAT_VERSION)}']
    for field in fields(report):
        value = getattr(report, field.name)
        if field.name in ("checks", "decisions", "codes") and value:
            items = ",\n  ".join(map(json_text, value))
            lines.append(f'"{field.name}": [\n  {items}\n ]')
        else:
            lines.append(f'"{field.name}": {json_text(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def schema() -> dict[str, Any]:
    """The JSON schema of reports."""
    text = own_text("refmoe.report", "verification.schema.json")
    document: dict[str, Any] = strict_json(text)
    return document
