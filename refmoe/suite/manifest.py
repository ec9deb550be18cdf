# SPDX-License-Identifier: Apache-2.0
"""Manifests: the digests of all files of a case, or of the golden folder around the cases.

A manifest also holds its own digest, so that no bit of it can change unseen. It names the file of the case's values by
that file's digest. So to rename a new manifest over the old one changes the whole case at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe import __version__
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.parsing import json_value
from refmoe.files.reading import decoded, exists, need_file, open_file, read_bytes
from refmoe.suite.case import CASE_FILE, is_count, is_list
from refmoe.traces.trace import FORMAT_VERSION

MANIFEST_FILE = "manifest.json"
DIGESTS = "SHA256SUMS"
"""The list of the digests of all files in a golden folder, the manifests included, so that no manifest names it."""
SUFFIXES = {"trace": "safetensors", "fingerprint": "json"}
CONTENT = r"(?:trace-[0-9a-f]{16}\.safetensors|fingerprint-[0-9a-f]{16}\.json)"
LEFTOVER = re.compile(rf"{CONTENT}|\.(?:{CONTENT}|manifest\.json|{DIGESTS})\.[a-z0-9_]+\.tmp")
"""The names of files that an emission writes, and of its temporary files."""
DIGEST = re.compile(r"[0-9a-f]{64}")
LARGEST = 1 << 30
"""No file of a golden has more bytes. A larger one is a mistake, and to read it takes minutes."""
NO_DIGEST = "0" * 64


def new_manifest(**fields: Any) -> dict[str, Any]:
    """A manifest of these fields, with the version of refmoe."""
    return {"format_version": FORMAT_VERSION, "generator": {"name": "refmoe", "version": __version__}, **fields}


def content_name(store: str, data: bytes) -> str:
    """The name of the file of a case's values: the store, and the first 16 digits of the SHA-256 of `data`."""
    return f"{store}-{digest(data)[:16]}.{SUFFIXES[store]}"


def content_file(manifest: dict[str, Any]) -> str:
    """The name of the file of values that a case's manifest has."""
    (name,) = manifest["files"].keys() - {CASE_FILE}
    return str(name)


def trace_path(folder: Path) -> Path:
    """The path of the golden trace of a case. Raises InputError when the case has none."""
    name = content_file(read_manifest(folder))
    if not name.startswith("trace-"):
        raise InputError(f"{folder}: this case stores a fingerprint, but one with a trace was expected")
    return folder / name


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with its own digest, whole or not at all."""
    text = json.dumps(manifest | {"digest": NO_DIGEST}, indent=1, allow_nan=False) + "\n"
    with replacing(folder / MANIFEST_FILE) as temporary:
        temporary.write_text(text.replace(NO_DIGEST, digest(text.encode())))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a case's manifest.json. Raises InputError when it is missing, was changed, or breaks the format."""
    path = folder / MANIFEST_FILE
    manifest = _read(path, "`refmoe suite emit CASE` writes it")
    content = [re.fullmatch(CONTENT, name) for name in manifest["files"].keys() - {CASE_FILE}]
    if CASE_FILE not in manifest["files"] or len(content) != 1 or not content[0]:
        raise InputError(f"{path}: 'files' must have {CASE_FILE} and one trace or fingerprint")
    if not isinstance(manifest.get("case"), str):
        raise InputError(f"{path}: 'case' is missing or not a string")
    if not is_digests(manifest.get("tensors")) or not manifest["tensors"]:
        raise InputError(f"{path}: 'tensors' is missing or not an object of SHA-256 digests")
    if not is_certificate(manifest.get("certificate", "")):
        raise InputError(f"{path}: 'certificate' is missing or neither null nor what `refmoe suite certify` writes")
    _refuse_unknown(path, manifest, {"case", "tensors", "certificate"})
    return manifest


def read_folder_manifest(golden: Path) -> dict[str, Any]:
    """Read a golden folder's manifest.json. Raises InputError as `read_manifest` does."""
    path = golden / MANIFEST_FILE
    manifest = _read(path, "`refmoe suite emit` writes it")
    cases = manifest.get("cases")
    if not isinstance(cases, list) or not all(isinstance(name, str) for name in cases):
        raise InputError(f"{path}: 'cases' is missing or not a list of strings")
    _refuse_unknown(path, manifest, {"cases"})
    return manifest


def write_folder_manifest(golden: Path) -> None:
    """Write the manifest of a golden folder: its cases by name, every other file by digest."""
    cases, files = members(golden)
    write_manifest(golden, new_manifest(cases=cases, files={name: file_digest(golden / name) for name in files}))


def members(golden: Path) -> tuple[list[str], list[str]]:
    """The names of the cases in a golden folder, and the relative paths of all other files, both in name order."""
    cases = sorted(path.parent.name for path in golden.glob(f"*/{CASE_FILE}"))
    inside = {golden / name for name in cases}
    files = [path for path in golden.rglob("*") if not path.is_dir() and not inside & {*path.parents}]
    names = sorted(path.relative_to(golden).as_posix() for path in files)
    return cases, [name for name in names if name not in (MANIFEST_FILE, DIGESTS) and not LEFTOVER.fullmatch(name)]


def leftovers(folder: Path) -> list[Path]:
    """Files left by emissions that were killed or replaced. No manifest names them, and they are harmless."""
    try:
        named = read_manifest(folder)["files"].keys() if (folder / CASE_FILE).exists() else ()
    except InputError:
        return []  # without the manifest, a left-over file cannot be told from a needed one
    return [path for path in sorted(folder.iterdir()) if LEFTOVER.fullmatch(path.name) and path.name not in named]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes. Raises InputError when the file cannot be read, or is larger than `LARGEST`."""
    if need_file(path, "a file of the goldens") > LARGEST:
        raise InputError(f"{path}: has more than {LARGEST:,} bytes, but a file of the goldens was expected")
    total = hashlib.sha256()
    with open_file(path, "a file of the goldens") as file:
        # not hashlib.file_digest: it never ends for a file that has nothing to read yet, such as /proc/kmsg
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def tensor_digest(array: NDArray[Any]) -> str:
    """The SHA-256 of an array's little-endian bytes in row-major order."""
    return digest(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())


def digest(data: bytes) -> str:
    """The SHA-256 of bytes, in 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def is_digests(value: Any) -> bool:
    """Whether the value is an object of SHA-256 digests."""
    return isinstance(value, dict) and all(isinstance(item, str) and DIGEST.fullmatch(item) for item in value.values())


def is_certificate(value: Any) -> bool:
    """Whether the value is null, or a certificate as `Certificate.to_json` makes it."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"arithmetic", "worst", "bounds", "relative", "decisions"}:
        return False
    worst, bounds, decisions = value["worst"], (value["bounds"], value["relative"]), value["decisions"]
    return (
        isinstance(value["arithmetic"], str)
        and isinstance(worst, dict)
        and isinstance(worst.get("tensor"), str)
        and is_bound(worst.get("relative", ""))
        and all(isinstance(each, dict) and all(map(is_bound, each.values())) for each in bounds)
        and isinstance(decisions, dict)
        and is_count(decisions.get("all"))
        and is_list(str)(decisions.get("unproven"))
    )


def is_bound(value: Any) -> bool:
    """Whether the value is a number from 0, or null for no bound."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)


def _read(path: Path, remedy: str) -> dict[str, Any]:
    if not exists(path):
        raise InputError(f"{path}: no such file; {remedy}")
    data = read_bytes(path, "a manifest")
    manifest = json_value(path, decoded(path, data, "a manifest"), "a manifest")
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: 'format_version' is missing or unknown, but \"{FORMAT_VERSION}\" was expected")
    own = manifest.pop("digest", None)
    if not isinstance(own, str) or digest(data.replace(own.encode(), NO_DIGEST.encode())) != own:
        raise InputError(f"{path}: 'digest' is not the SHA-256 of this file, so something in it was changed")
    generator = manifest.get("generator")
    if not isinstance(generator, dict) or [*map(type, map(generator.get, ("name", "version")))] != [str, str]:
        raise InputError(f"{path}: 'generator' is missing or has no 'name' and 'version'")
    if not is_digests(manifest.get("files")):
        raise InputError(f"{path}: 'files' is missing or not an object of SHA-256 digests")
    return manifest


def _refuse_unknown(path: Path, manifest: dict[str, Any], own: set[str]) -> None:
    for name in sorted(manifest.keys() - own - {"format_version", "generator", "files"}):
        raise InputError(f"{path}: unknown field '{name}'")
