# SPDX-License-Identifier: Apache-2.0
"""A verification as one JSON object, with the fields of `refmoe.verifier.findings`.

JSON cannot write numbers that are not finite. They become the strings "NaN", "Infinity" and "-Infinity", as in the JSON
form of Protocol Buffers. `float` of Python and `Number` of JavaScript read them. None becomes null.
The file verification.schema.json explains each field.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any

from refmoe.files.parsing import strict_json
from refmoe.files.reading import own_text
from refmoe.verifier.findings import Report

FORMAT_VERSION = "2"


def to_json(report: Report) -> str:
    """The whole report. Each check and decision has a line of its own, so that text tools can search it."""
    lines = [f'"format_version": {_encode(FORMAT_VERSION)}']
    for field in fields(report):
        value = getattr(report, field.name)
        if field.name in ("checks", "decisions") and value:
            items = ",\n  ".join(map(_encode, value))
            lines.append(f'"{field.name}": [\n  {items}\n ]')
        else:
            lines.append(f'"{field.name}": {_encode(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def schema() -> dict[str, Any]:
    """The JSON schema of reports."""
    text = own_text("refmoe.report", "verification.schema.json")
    document: dict[str, Any] = strict_json(text)
    return document


def _encode(value: object) -> str:
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: object) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
