# SPDX-License-Identifier: Apache-2.0
"""Check a golden folder: compare every digest, and recompute every case."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.suite.activations import compute, compute_fingerprints
from refmoe.suite.case import CASE_FILE, FAMILIES, Case, find_cases, read_case
from refmoe.suite.digests import verify_digests
from refmoe.suite.fingerprint import Fingerprint, fingerprint_difference, read_fingerprints
from refmoe.suite.manifest import (
    MANIFEST_FILE,
    content_file,
    file_digest,
    leftovers,
    members,
    read_folder_manifest,
    read_manifest,
    tensor_digest,
)
from refmoe.traces.trace import read_trace


@dataclass(frozen=True)
class Difference:
    """A difference between a golden folder and its manifests or its recomputed values."""

    case: str
    """The name of the case; empty for a document beside the cases."""
    what: str
    """A sentence: the file, and for a tensor its name, the index of the first different element and both values."""


def verify_files(golden: Path) -> list[Difference]:
    """Compare every file of a golden folder with the manifests, and return the differences. Nothing is recomputed."""
    found = verify_documents(golden)
    for folder in find_cases(golden, FAMILIES):
        found += verify_case_files(folder)
    return found


def verify_documents(golden: Path) -> list[Difference]:
    """Compare the documents of a golden folder, the names of its cases and its list of digests with its manifest."""
    try:
        manifest = read_folder_manifest(golden)
    except InputError as error:
        return [Difference("", str(error))]
    cases, files = members(golden)
    found = []
    for name in sorted({*cases} ^ {*manifest["cases"]}):
        missing = name in manifest["cases"]
        found.append(f"{golden / name}: the case is {'missing' if missing else f'not in {MANIFEST_FILE}'}")
    for name in sorted({*files} - manifest["files"].keys()):
        found.append(f"{golden / name}: an unexpected file")
    found += [*_verify_digests(golden, manifest["files"]), *verify_digests(golden)]
    return [Difference("", what) for what in found]


def verify_case_files(folder: Path) -> list[Difference]:
    """Compare the files of a case with its manifest."""
    name = folder.resolve().name
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        return [Difference(name, str(error))]
    found = [] if manifest["case"] == name else [f"{folder / MANIFEST_FILE}: is that of case '{manifest['case']}'"]
    expected = {MANIFEST_FILE, *manifest["files"], *(path.name for path in leftovers(folder))}
    for path in sorted(folder.iterdir()):
        if path.name not in expected:
            found.append(f"{path}: an unexpected file")
    wrong = _verify_digests(folder, manifest["files"])
    return [Difference(name, what) for what in found + wrong]


def _verify_digests(folder: Path, files: dict[str, str]) -> list[str]:
    found = []
    for name, expected in sorted(files.items()):
        if not (folder / name).exists():
            found.append(f"{folder / name}: is missing")
        elif file_digest(folder / name) != expected:
            found.append(f"{folder / name}: SHA-256 differs from the manifest's")
    return found


def check(
    folder: Path, progress: Callable[[], None] | None = None, place: Place = CPU, executor: str | None = None
) -> list[Difference]:
    """Recompute a case and compare every bit and every digest.

    progress: called after each layer of each run.   executor: as for `compute_fingerprints`
    returns: the differences, none if the case is intact.
    """
    found = verify_case_files(folder)

    def differs(what: str) -> None:
        found.append(Difference(folder.resolve().name, what))

    try:
        case = read_case(folder)
        name = content_file(read_manifest(folder))
        if not name.startswith(case.store):
            differs(f'{folder / name}: is no {case.store}, but {CASE_FILE} has store = "{case.store}"')
        else:
            if case.store == "trace":
                wrong = _check_trace(case, folder / name, progress, place)
            else:
                wrong = _check_fingerprints(
                    case, folder / name, compute_fingerprints(case, progress, place=place, executor=executor)
                )
            for what in wrong:
                differs(what)
    except InputError as error:
        if not any(difference.what == str(error) for difference in found):
            differs(str(error))
    return found


def _check_trace(case: Case, path: Path, progress: Callable[[], None] | None, place: Place) -> list[str]:
    computed = compute(case, progress, place)
    digests = {key: tensor_digest(array) for key, array in computed.items()}
    if not path.exists():
        return _check_digests(case, digests)  # `verify_case_files` has reported the missing trace
    trace = read_trace(path)
    runs = [] if trace.header.runs == case.runs() else [f"{path}: its runs are not those of {CASE_FILE}"]
    wrong = _check_values(
        path,
        trace.tensors.keys(),
        computed.keys(),
        lambda key: first_difference(trace.tensors[key].map(), computed[key]),
    )
    return [*runs, *wrong.values(), *_check_digests(case, digests, wrong.keys())]


def _check_fingerprints(case: Case, path: Path, computed: dict[str, Fingerprint]) -> list[str]:
    digests = {key: value.sha256 for key, value in computed.items()}
    if not path.exists():
        return _check_digests(case, digests)
    header, stored = read_fingerprints(path)
    runs = [] if header.runs == case.runs() else [f"{path}: its runs are not those of {CASE_FILE}"]
    wrong = _check_values(
        path, stored.keys(), computed.keys(), lambda key: fingerprint_difference(stored[key], computed[key])
    )
    return [*runs, *wrong.values(), *_check_digests(case, digests, wrong.keys())]


def _check_values(
    path: Path, stored: Set[str], computed: Set[str], compare: Callable[[str], str | None]
) -> dict[str, str]:
    """Per tensor that differs from the computed one, the end of a sentence about the difference."""
    found = {}
    for key in sorted(stored | computed):
        if key not in stored or key not in computed:
            found[key] = f"{path}: tensor '{key}' is {'missing' if key in computed else 'unexpected'}"
        elif sentence := compare(key):
            found[key] = f"{path}: tensor '{key}' {sentence}"
    return found


def _check_digests(case: Case, digests: dict[str, str], said: Set[str] = frozenset()) -> list[str]:
    """Compare the digests of computed tensors with the manifest.   said: tensors already reported, which are skipped"""
    path, listed = case.folder / MANIFEST_FILE, read_manifest(case.folder)["tensors"]
    found = []
    for key in sorted((digests.keys() | listed.keys()) - said):
        if key not in listed or key not in digests:
            found.append(f"{path}: tensor '{key}' is {'missing' if key in digests else 'unexpected'}")
        elif listed[key] != digests[key]:
            found.append(f"{path}: the digest of tensor '{key}' is not that of its computed values")
    return found


def first_difference(stored: NDArray[Any], computed: NDArray[Any]) -> str | None:
    """The first element in which the bits of two arrays differ, in words, or None."""
    if stored.dtype != computed.dtype or stored.shape != computed.shape:
        return f"is {stored.dtype} {list(stored.shape)}, but {computed.dtype} {list(computed.shape)} was computed"
    bits = (np.ascontiguousarray(array).view(np.int64) for array in (stored, computed))
    different = np.argwhere(np.not_equal(*bits))
    if not len(different):
        return None
    at = tuple(different[0].tolist())
    count = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"differs at {list(at)}{count}: stored {stored[at]!r}, computed {computed[at]!r}"
