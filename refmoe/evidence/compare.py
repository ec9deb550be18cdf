# SPDX-License-Identifier: Apache-2.0
"""The differences of two JSON values, each with its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from refmoe.files.sentences import quoted, shown

DIGITS = 1e-6
"""Figures are compared to six digits: their last ones may differ between machines, as the order of a sum may."""


def differences(found: Any, wanted: Any, place: str = "") -> Iterator[str]:
    """The places at which a value differs from the wanted one, a clause each.   place: of the value in its document"""
    inside = f"{place}." if place else ""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            name = f"{inside}{key}"
            if key not in found:
                yield f"{quoted(name)} is missing"
            elif key not in wanted:
                yield f"{quoted(name)} does not follow from the package"
            else:
                yield from differences(found[key], wanted[key], name)
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, pair in enumerate(zip(found, wanted, strict=True)):
            yield from differences(*pair, f"{inside}{i}")
    elif not _equal(found, wanted):
        yield f"{quoted(place)} is {shown(found)}, but {shown(wanted)} follows from the package"


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return abs(found - wanted) <= DIGITS * abs(wanted)
    return type(found) is type(wanted) and bool(found == wanted)
