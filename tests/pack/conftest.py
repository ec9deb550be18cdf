# SPDX-License-Identifier: Apache-2.0
"""A smoke pack in a folder, and what is legal in its cases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from refmoe.suite import Case, read_case
from refmoe.suite.pack.contents import Judged, taps_of
from refmoe.suite.pack.legal import DTYPES, Legal, legal
from refmoe.suite.pack.sizes import SMOKE, table
from refmoe.suite.pack.writing import Part, pack_files, write_pack
from tests.pack.packs import GOLDEN


@dataclass(frozen=True)
class Known:
    """A case of the pack, with what its files were made of."""

    case: Case
    folder: Path
    taps: dict[tuple[str, str], Judged]
    legal: dict[str, Legal]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke pack."""
    folder = tmp_path_factory.mktemp("packs") / "smoke"
    parts = [Part(GOLDEN / name, left_out) for name, left_out in table()[SMOKE].cases.items()]
    write_pack(folder, pack_files(SMOKE, parts, "processes:1"))
    return folder


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """A case with all taps: two layers, a window, and choices that rounding decides."""
    folder = tmp_path_factory.mktemp("packs") / "whole"
    write_pack(folder, pack_files(SMOKE, [Part(GOLDEN / "window-1")], "processes:1"))
    case = read_case(GOLDEN / "window-1")
    taps = {(each.run.run, each.tap): each for each in taps_of(case)}
    return Known(case, folder / "cases" / "window-1", taps, {dtype: legal(case, dtype) for dtype in DTYPES})
