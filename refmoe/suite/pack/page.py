# SPDX-License-Identifier: Apache-2.0
"""The page in a pack: the layout, what the pack cannot see, and the versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.files.reading import own_text
from refmoe.suite.pack.legal import DTYPES
from refmoe.suite.pack.sizes import SIZES, Size, table


def page(size: str | None, versions: Iterable[Mapping[str, Any]]) -> str:
    """The page of a pack, in Markdown.   size: of the suite's own cases, whose power was measured; None: other cases"""
    layout = own_text("refmoe.suite.pack", "PACK.md")
    return "\n".join([layout, *(limits(size, table()) if size else UNKNOWN), *history(versions)])


HEADING = "## What a pack cannot see"
UNKNOWN = (HEADING, "", "This pack was not made of the suite's own cases. The bugs that it shows were not counted.")


def limits(size: str, sizes: Mapping[str, Size]) -> list[str]:
    """The power of the sizes of packs, in lines."""
    lines = [
        HEADING,
        "",
        "The catalogue of refmoe has bugs that engines really had. Each was planted into the specification, which then",
        "ran on cases of each size. A bug is seen where a value is outside its interval, or a choice of experts wrong.",
        "The second number of a pair is that of `refmoe verify`. It has the engine's own values, and recomputes each",
        "step from them. So it also judges what follows an open choice, errors that lean to one side, and quantised",
        "weights.",
        "",
        f"| size | cases | bytes | {' | '.join(f'bugs seen in {dtype}' for dtype in DTYPES)} |",
        f"|{' --- |' * (3 + len(DTYPES))}",
    ]
    for name in SIZES:
        each = sizes[name]
        seen = " | ".join(f"{each.seen[dtype]} of {each.seen[dtype] + len(each.unseen[dtype])}" for dtype in DTYPES)
        here = f"**{name}**" if name == size else name
        lines.append(f"| {here} | {len(each.cases)} | {each.bytes:,} | {seen} |")
    return [*lines, "", *shares(sizes[size]), "", *missing(sizes[size])]


def shares(size: Size) -> list[str]:
    """The shares of values that are judged, in lines."""
    parts = [f"{size.judged[dtype] / max(size.values[dtype], 1):.1%} in {dtype}" for dtype in DTYPES]
    return [
        f"Of the values in this pack, {', '.join(parts)} have an interval.",
        "The others depend on a choice of experts that rounding can decide, may overflow, or are masked scores.",
    ]


def missing(size: Size) -> list[str]:
    """The known bugs that a pack does not see in float32, in lines."""
    if not size.unseen["float32"]:
        return ["In float32 this pack sees all bugs of the catalogue that a forward pass can show."]
    lines = ["In float32 this pack does not see:", ""]
    return lines + [f"- `{name}`: {MUTANTS[name].about}" for name in size.unseen["float32"]]


def history(versions: Iterable[Mapping[str, Any]]) -> Sequence[str]:
    """The versions with their changes, in lines."""
    lines = ["", "## Changes", ""]
    return [*lines, *(f"- {each['version']}: {' '.join(each['changes'])}" for each in versions), ""]
