# SPDX-License-Identifier: Apache-2.0
"""JSON that every parser reads: all that commands print as JSON is made here.

JSON cannot write numbers that are not finite. They become the strings "NaN", "Infinity" and "-Infinity", as in the JSON
form of Protocol Buffers. `float` of Python and `Number` of JavaScript read them. None becomes null.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from typing import Any


def json_text(value: object) -> str:
    """A value as JSON in one line. Dataclasses become objects."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: object) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
