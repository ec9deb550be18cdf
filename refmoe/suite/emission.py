# SPDX-License-Identifier: Apache-2.0
"""Emit a case: compute it and write it, so that a reader finds the whole old case or the whole new one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from refmoe import __version__
from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.jobs.parts import kept_parts
from refmoe.suite.activations import compute, compute_fingerprints
from refmoe.suite.case import CASE_FILE, Case
from refmoe.suite.fingerprint import fingerprint_text
from refmoe.suite.manifest import (
    content_file,
    content_name,
    digest,
    file_digest,
    leftovers,
    new_manifest,
    read_manifest,
    tensor_digest,
    write_manifest,
)
from refmoe.traces.trace import Header, trace_bytes


def emit(
    case: Case, progress: Callable[[], None] | None = None, place: Place = CPU, executor: str | None = None
) -> Path:
    """Compute the case and write its values, then its manifest. Returns the path of the file of values.

    progress: called after each layer of each run.   executor: as for `compute_fingerprints`
    The values go to a new file, named by its own digest, which no manifest names yet. Then the new manifest is renamed
    over the old one: this one step changes the case. Files that only the old manifest named are removed last. So a
    process that is killed at any moment leaves the whole old case or the whole new one.
    The certificate is kept if the values have not changed. Finished layers of a full-size case are kept in the folder
    NAME.parts of the working directory until the case is written.
    """
    parts = Path(f"{case.name}.parts") if case.full_size and not place.on_gpu else None
    with nullcontext() if parts is None else kept_parts(parts):
        path = _write(case, parts, progress, place, executor)
        if parts is not None:
            shutil.rmtree(parts)
    return path


def _write(
    case: Case, parts: Path | None, progress: Callable[[], None] | None, place: Place, executor: str | None
) -> Path:
    """Compute the case and write its values and manifest.   parts: the folder of finished layers"""
    header = Header(case.runs(), case.name, policy="exact")
    if case.store == "trace":
        arrays = compute(case, progress, place)
        data = trace_bytes(header, arrays)
        tensors = {key: tensor_digest(arrays[key]) for key in sorted(arrays)}
    else:
        fingerprints = compute_fingerprints(case, progress, parts, place, executor)
        data = fingerprint_text(header, fingerprints).encode()
        tensors = {key: fingerprints[key].sha256 for key in sorted(fingerprints)}
    path = case.folder / content_name(case.store, data)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    files = {CASE_FILE: case.digest, path.name: digest(data)}
    try:
        old = read_manifest(case.folder)
        certificate = old["certificate"] if (old["files"], old["tensors"]) == (files, tensors) else None
    except InputError:
        certificate = None
    write_manifest(case.folder, new_manifest(case=case.name, files=files, tensors=tensors, certificate=certificate))
    remove_leftovers(case.folder)
    return path


def is_emitted(case: Case) -> bool:
    """Whether the case on disk is whole, and was made from its present case.toml by this version of refmoe."""
    try:
        manifest = read_manifest(case.folder)
        name = content_file(manifest)
        return (
            manifest["generator"]["version"] == __version__
            and manifest["case"] == case.name
            and manifest["files"][CASE_FILE] == case.digest
            and manifest["files"][name] == file_digest(case.folder / name)
            and name.startswith(case.store)
        )
    except InputError:
        return False


def remove_leftovers(folder: Path) -> None:
    """Remove the files that killed or replaced emissions left in a folder."""
    for path in leftovers(folder):
        path.unlink(missing_ok=True)
