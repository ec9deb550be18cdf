# SPDX-License-Identifier: Apache-2.0
"""Packs: golden cases as data, with the legal interval of every value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refmoe import suite
from refmoe.api.progress import Bars, silent
from refmoe.suite.golden_folder import case_folder, golden_folder, own_folder
from refmoe.suite.pack.sizes import FULL, SIZES, SMOKE, STANDARD, table
from refmoe.suite.pack.writing import Part, pack_files, replaced, versions, write_pack

__all__ = ["FULL", "SIZES", "SMOKE", "STANDARD", "Packed", "pack_suite"]


@dataclass(frozen=True)
class Packed:
    """A pack that was written."""

    folder: Path
    version: str
    size: str
    cases: tuple[str, ...]
    bytes: int
    """Of all files."""


def pack_suite(
    folder: Path, size: str = STANDARD, golden: Path | None = None, *, executor: str | None = None,
    bars: Bars = silent,
) -> Packed:  # fmt: skip
    """Write a pack into a folder: a new one, or one that holds a pack.

    size: of `SIZES`; `FULL` has all cases of the folder whose golden has every value
    golden: the folder of cases; None: the package's own   executor: of the cases; None: a process per core
    Raises InputError when a case is missing, or the folder holds anything else or cannot be written.
    """
    golden = golden_folder(golden)
    if size == FULL:
        chosen = [Part(case) for case in suite.find_cases(golden) if suite.read_case(case).store == "trace"]
    else:
        chosen = [Part(case_folder(name, golden), left_out) for name, left_out in table()[size].cases.items()]
    replaced(folder)
    with bars("pack", len(chosen)) as advance:
        files = pack_files(size, chosen, executor, advance, own=golden.resolve() == own_folder().resolve())
    write_pack(folder, files)
    return Packed(
        folder=folder, version=versions()[0]["version"], size=size, cases=tuple(part.name for part in chosen),
        bytes=sum(map(len, files.values())),
    )  # fmt: skip
