# SPDX-License-Identifier: Apache-2.0
"""Numbers that a person typed: ASCII digits only. Python's `int` also takes ``1_0`` and the digits of other scripts."""

from __future__ import annotations

import math
import re

INTEGER = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)
LONGEST = 40
"""The most characters of a decimal number."""


def integer(text: str) -> int | None:
    """The integer that a text is, of at most 19 digits; None where it is none."""
    return int(text) if INTEGER.fullmatch(text) else None


def decimal(text: str) -> float | None:
    """The finite number that a text is; None where it is none."""
    value = float(text) if len(text) <= LONGEST and DECIMAL.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None
