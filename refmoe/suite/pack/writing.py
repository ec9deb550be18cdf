# SPDX-License-Identifier: Apache-2.0
"""Build a pack, and write it: the files of its cases, the page about it, and at last the list of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.checkpoints.write import new_folder
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.parsing import strict_json
from refmoe.files.reading import exists, is_folder, own_text, read_text
from refmoe.parallel import results
from refmoe.suite.case import read_case
from refmoe.suite.manifest import digest
from refmoe.suite.pack.contents import FILES, FORMAT, case_files, taps_of
from refmoe.suite.pack.legal import DEVIATIONS, DTYPES
from refmoe.suite.pack.page import page
from refmoe.verifier.segments import SIGNIFICANCE

LIST, PAGE, CASES = "pack.json", "PACK.md", "cases"
TITLE = "# The layout of a pack"
"""The first line of the page."""
OF_A_PACK = re.compile(
    rf"\.?({LIST}|{PAGE})(\.\w+\.tmp)?|{CASES}/[^/]+/\.?({'|'.join(map(re.escape, FILES))})(\.\w+\.tmp)?"
)
"""The names of files of a pack, and of those that a killed command leaves."""

Files = dict[str, bytes]
"""The files of a pack by their names, with ``/`` between the parts."""


@dataclass(frozen=True)
class Part:
    """A case in a pack."""

    folder: Path
    left_out: tuple[str, ...] = ()
    """The steps whose taps are left out."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def versions() -> list[dict[str, Any]]:
    """The versions of packs, the newest first: each with its changes, and per size the digest of its files."""
    found: list[dict[str, Any]] = strict_json(own_text("refmoe.suite.pack", "changes.json"))
    return found


def files_of(part: Part) -> Files:
    """The files of a case in a pack."""
    case = read_case(part.folder)
    made = case_files(case, taps_of(case), part.left_out)
    return {f"{CASES}/{part.name}/{name}": data for name, data in made.items()}


def pack_files(
    size: str, parts: Sequence[Part], executor: str | None = None, progress: Callable[[], None] | None = None,
    own: bool = True,
) -> Files:  # fmt: skip
    """The files of a pack, the list of them last.

    own: whether these are the suite's own cases, so that the page has the bugs that they show
    executor: of the cases; None: a process per core   progress: called after each case
    """
    made: dict[str, Files] = {}
    with results(files_of, parts, executor) as built:
        for part, files in built:
            made[part.name] = files
            if progress is not None:
                progress()
    files = {name: data for part in parts for name, data in made[part.name].items()}
    document = {
        "format": FORMAT, "licence": "Apache-2.0", "version": versions()[0]["version"], "size": size, "dtypes": DTYPES,
        "deviations": round(DEVIATIONS, 6), "significance": SIGNIFICANCE, "cases": [part.name for part in parts],
        "files": {name: digest(data) for name, data in files.items()},
    }  # fmt: skip
    text = json.dumps(document, indent=1) + "\n"
    return {**files, PAGE: page(size if own else None, versions()).encode(), LIST: text.encode()}


def digest_of(files: Files) -> str:
    """The digest of the files of all cases of a pack, as `versions` has it."""
    lines = [f"{digest(data)}  {name}\n" for name, data in sorted(files.items()) if name.startswith(CASES)]
    return digest("".join(lines).encode())


def write_pack(folder: Path, files: Files) -> None:
    """Write the files of a pack, and remove those of the pack that was there.

    The page is written first: it marks the folder, so that a command that was killed can be repeated. The list is
    written last: a folder with a list is complete.
    Raises InputError when the folder holds anything but a pack, or cannot be written.
    """
    old = replaced(folder)
    order = sorted(files, key=lambda name: (name != PAGE, name == LIST))
    try:
        with new_folder(folder):
            (folder / LIST).unlink(missing_ok=True)
            for name in order:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with replacing(folder / name) as temporary:
                    temporary.write_bytes(files[name])
                if name == PAGE:
                    remove(folder, old - files.keys())
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None


def remove(folder: Path, names: set[str]) -> None:
    """Remove files of a pack, and the folders of cases that become empty."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        if not any((folder / name).parent.iterdir()):
            (folder / name).parent.rmdir()


def replaced(folder: Path) -> set[str]:
    """The files of a folder that a pack may replace: none where there is no folder, or an empty one.

    Raises InputError when the folder holds anything but a pack.
    """
    if not is_folder(folder):
        return set()
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if not is_folder(path)}
    if not names:
        return set()
    page_there = folder / PAGE
    if not exists(page_there) or not read_text(page_there, "the page of a pack").startswith(TITLE):
        raise InputError(f"{folder}: holds files, but no pack; a new folder, or one with a pack, was expected")
    strangers = sorted(name for name in names if not OF_A_PACK.fullmatch(name))
    if strangers:
        raise InputError(f"{folder / strangers[0]}: is no file of a pack, but a folder with a pack alone was expected")
    return names - {PAGE, LIST}
