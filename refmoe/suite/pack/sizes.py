# SPDX-License-Identifier: Apache-2.0
"""The sizes of packs: their cases and taps, and the known bugs that they show.

The table ``sizes.json`` beside this file is what `python -m bench.pack` measured and chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from refmoe.files.parsing import strict_json
from refmoe.files.reading import own_text

FORMAT_VERSION = "1"
TABLE = "sizes.json"
SMOKE, STANDARD, FULL = SIZES = ("smoke", "standard", "full")
MOST_BYTES = {SMOKE: 250_000, STANDARD: 1_200_000}
"""No pack of such a size has more bytes, over all of its files."""


@dataclass(frozen=True)
class Size:
    """A size of packs."""

    cases: dict[str, tuple[str, ...]]
    """The names of the cases in their order, each with the steps whose taps are left out."""
    bytes: int
    """Of the files of all cases."""
    values: dict[str, int]
    """Per dtype the number of values, over all taps."""
    judged: dict[str, int]
    """Per dtype the number of values that have an interval."""
    seen: dict[str, int]
    """Per dtype the number of known bugs that some value or choice shows."""
    unseen: dict[str, tuple[str, ...]]
    """Per dtype the known bugs that `refmoe verify` sees on some case, and this pack does not."""


@cache
def table() -> dict[str, Size]:
    """The measured sizes, as the package holds them."""
    document: dict[str, Any] = strict_json(own_text("refmoe.suite.pack", TABLE))
    assert document["format_version"] == FORMAT_VERSION

    return {
        name: Size(
            cases={case: tuple(left_out) for case, left_out in each["cases"].items()}, bytes=each["bytes"],
            values=each["values"], judged=each["judged"], seen=each["seen"],
            unseen={dtype: tuple(bugs) for dtype, bugs in each["unseen"].items()},
        )
        for name, each in document["sizes"].items()
    }  # fmt: skip
