# SPDX-License-Identifier: Apache-2.0
"""Rebuild a golden from the code alone, in an empty folder, and compare its files with a published list of digests.

Of the golden at hand, only its definition is read, case.toml, and from its manifest what no computation of the values
gives: who wrote it and its certificate. `refmoe.suite.certify` proves that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.reading import read_bytes
from refmoe.files.writable import make_folder
from refmoe.suite.case import CASE_FILE, read_case
from refmoe.suite.emission import emit
from refmoe.suite.manifest import CONTENT, MANIFEST_FILE, file_digest, read_manifest, write_manifest


@dataclass(frozen=True)
class Rebuilt:
    """A golden that was rebuilt."""

    files: Mapping[str, str]
    """The SHA-256 of each of its files, by ``<case>/<file>``."""
    differences: tuple[str, ...]
    """The files that the list has otherwise, a sentence each."""


def rebuild(
    source: Path,
    folder: Path,
    listed: Mapping[str, str],
    progress: Callable[[], None] | None = None,
    place: Place = CPU,
    executor: str | None = None,
) -> Rebuilt:
    """Rebuild one golden.

    source: the folder of the golden at hand   folder: where the folder of the rebuilt one is made
    listed: the published digests, by ``<case>/<file>``   progress, executor: as for `emit`
    Raises InputError where the case cannot be read, or the folder cannot be written.
    """
    name = source.resolve().name
    made = folder / name
    make_folder(made, parents=True, exist_ok=False)
    with replacing(made / CASE_FILE) as temporary:
        temporary.write_bytes(read_bytes(source / CASE_FILE, "a case in TOML"))
    values = emit(read_case(made), progress, place, executor)
    try:
        stated = read_manifest(source)
    except InputError:
        pass  # then the manifest differs from the published one, which is said below
    else:
        taken = {field: stated[field] for field in ("generator", "certificate")}
        write_manifest(made, read_manifest(made) | taken)
    files = {f"{name}/{file}": file_digest(made / file) for file in (CASE_FILE, MANIFEST_FILE, values.name)}
    return Rebuilt(files=files, differences=tuple(differences(name, files, listed)))


def differences(name: str, files: Mapping[str, str], listed: Mapping[str, str]) -> Iterator[str]:
    """The differences of a case from the list, a sentence each: the file, what was found and what was expected."""
    published = {file: digest for file, digest in listed.items() if file.startswith(f"{name}/")}
    if not published:
        yield f"{name}: was rebuilt, but the list has no file of this case"
        return
    for file, digest in files.items():
        if file in published:
            if published[file] != digest:
                yield f"{file}: has the SHA-256 {digest}, but {published[file]} was published"
        elif is_values(file):
            others = [f"{published[each]} was published as {each}" for each in published if is_values(each)]
            expected = ", ".join(others) or "the list has no values of this case"
            yield f"{file}: has the SHA-256 {digest}, but {expected}"
        else:
            yield f"{file}: has the SHA-256 {digest}, but the list has no such file"
    for file in published:
        if file not in files and not is_values(file):
            yield f"{file}: was not rebuilt, but the list has it"


def is_values(file: str) -> bool:
    """Whether a file holds the values of a case. Its name has its own digest, so other values have another name."""
    return re.fullmatch(CONTENT, file.rpartition("/")[2]) is not None
