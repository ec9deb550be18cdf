# SPDX-License-Identifier: Apache-2.0
"""Lists of digests: a line for each file of a folder, as ``sha256sum -c`` reads it.

A folder of goldens may have one, over all files of its cases, its documents and its manifest. Releases publish it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.reading import exists, read_bytes, read_text
from refmoe.files.sentences import quoted
from refmoe.suite.manifest import DIGESTS, MANIFEST_FILE, file_digest, leftovers, members

DIGEST_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def digests_text(folder: Path, names: Iterable[str]) -> str:
    """The text of a list.   names: of files in the folder, in the order of the lines"""
    return "".join(f"{file_digest(folder / name)}  {name}\n" for name in names)


def read_digests(path: Path) -> list[tuple[str, str]]:
    """The lines of a list: (name, SHA-256). Raises InputError for a line that is none."""
    return [*_lines(path, read_text(path, "a list of digests"))]


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        match = DIGEST_LINE.fullmatch(line)
        if match is None:
            raise InputError(
                f"{path}: line {number} is {quoted(line)}, but a SHA-256, two blanks and a name were expected"
            )
        yield match[2], match[1]


def listed_files(golden: Path) -> list[str]:
    """The names of all files in a golden folder, in name order: without the list itself, and without leftovers."""
    cases, names = members(golden)
    for case in cases:
        left = leftovers(golden / case)
        files = [path for path in (golden / case).rglob("*") if path not in left and not path.is_dir()]
        names += [path.relative_to(golden).as_posix() for path in files]
    return sorted([*names, MANIFEST_FILE] if exists(golden / MANIFEST_FILE) else names)


def write_digests(golden: Path) -> None:
    """Write the list of a golden folder, whole or not at all."""
    text = digests_text(golden, listed_files(golden))
    with replacing(golden / DIGESTS) as temporary:
        temporary.write_text(text, encoding="utf-8")


def renew_digests(golden: Path) -> None:
    """Write the list of a golden folder anew, where it has one. Whoever writes into such a folder calls this last."""
    if exists(golden / DIGESTS):
        write_digests(golden)


def verify_digests(golden: Path) -> list[str]:
    """Compare the list of a golden folder with its files. A sentence for each difference; none without a list."""
    path = golden / DIGESTS
    if not exists(path):
        return []
    try:
        listed = read_digests(path)
    except InputError as error:
        return [str(error)]
    found = [f"{path}: {each}" for each in digest_faults(golden, listed)]
    names = listed_files(golden)
    found += [f"{path}: has no line for {name}" for name in sorted({*names} - {name for name, _ in listed})]
    if not found and read_bytes(path, "a list of digests") != digests_text(golden, names).encode():
        found.append(f"{path}: its lines are not in the order of their names, each once and with a line feed")
    return found


def digest_faults(folder: Path, listed: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The files of a folder that are not as a list says, a clause each.   listed: names and digests"""
    for name, expected in listed:
        if not is_inside(name):
            yield f"has a line for {quoted(name)}, but a file of the folder was expected"
        elif not exists(folder / name):
            yield f"has a line for {quoted(name)}, which is missing"
        elif (found := file_digest(folder / name)) != expected:
            yield f"has the SHA-256 {expected} for {name}, but that of the file is {found}"


def is_inside(name: str) -> bool:
    """Whether a name in a list is that of a file below the folder of the list."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
